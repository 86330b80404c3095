"""The TPU simulator, which sees what Pallas' interpreter hides: races, copies nobody waits for, reads out of bounds."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


@pytest.fixture
def simulator():
    """Parameters for `interpret`; the test fails if what it ran with them had a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    pltpu.reset_tpu_interpret_mode_state()
    yield pltpu.InterpretParams(
        detect_races=True,
        num_cores_or_threads=2,
        random_seed=0,
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
    )
    found = interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
    assert not found


@pytest.fixture(scope="session")
def lower():
    """lower(function, shapes, implementation) -> the text that the compiler of a TPU (v5e) or of a GPU gets."""
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")

    def text(function, shapes, implementation: str) -> str:
        traced = jax.jit(function).trace
        if implementation == "gpu":
            return traced(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        with use_abstract_mesh(
            AbstractMesh((1,), ("x",), abstract_device=chip)
        ):  # some rules ask for the chip
            return traced(*shapes).lower(lowering_platforms=("tpu",)).as_text()

    return text
