"""Drafters on disk, bound to the target they were trained for.

    drafter.json          the drafter's config, and of its target: path, fingerprint, vocabulary, tokenizer
    drafter.safetensors   its parameters, named by `/`-joined path

is a *drafter directory*, which `save_drafter` writes. `load_drafter` reads it, the workdir of a run of
`DrafterTraining`, and any decoder, which then is a draft model. A trained drafter does no harm with another target,
but it would guess badly and nobody would know why: so it is refused.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from research import config as configs
from research.config_capture import capture
from research.decoding.proposers import Proposer, Target
from research.decoding.speculative.aded import ADED
from research.decoding.speculative.draft_model import DraftModel, Submodel, check_draft
from research.decoding.speculative.iad import IAD
from research.decoding.speculative.prompt_lookup import PromptLookup
from research.decoding.speculative.training import DrafterTraining
from research.errors import UserError, nearest
from research.nn.transformer import unscan_layers
from research.paths import expand
from research.training import checkpoint_files as files
from research.training.model_directory import CONFIG, Loaded, fingerprint, read_config
from research.training.paths import PyTree, named_leaves
from research.training.workdir import load_model, read_checkpoint

DRAFTER, WEIGHTS = "drafter.json", "drafter.safetensors"

TRAINING = f"{DrafterTraining.__module__}:{DrafterTraining.__qualname__}"

UNTRAINED = {"prompt_lookup": PromptLookup, "submodel": Submodel, "iad": IAD, "aded": ADED}
"""Drafters that need no training, by the name that programs call them."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a drafter remembers of its target.

    path: where it was, as the config said. fingerprint: of its parameters. vocab_size: V. tokenizer: its
    fingerprint, or None.
    """

    path: str
    fingerprint: str
    vocab_size: int
    tokenizer: str | None

    @classmethod
    def of(cls, target: Loaded, path: str) -> "Identity":
        tokenizer = None if target.tokenizer is None else target.tokenizer.fingerprint
        return cls(path, fingerprint(target.params), target.model.vocab_size, tokenizer)


@dataclasses.dataclass(frozen=True)
class LoadedDrafter:
    """A drafter, its parameters (empty where it has none), the config that builds it, and its target's identity
    (None where any target will do)."""

    proposer: Proposer
    params: PyTree
    config: ConfigDict
    identity: Identity | None

    def target_params(self, target: Loaded) -> PyTree:
        """The parameters to decode: the target's own, or what the drafter's training made of them (Medusa-2)."""
        if hasattr(self.proposer, "tuned"):
            return self.proposer.tuned(self.params, Target(target.params, target.model))
        return target.params


def save_drafter(
    directory: str | os.PathLike[str], config: ConfigDict, params: PyTree, target: Loaded, path: str
) -> None:
    """Writes a drafter directory.

    config: of the drafter; params: nested dict of arrays; target: what it was trained for, found at `path`.

    Raises:
        UserError: the parameters do not fit the config and the target, or can't be written.
    """
    import safetensors.numpy

    folder = files.local_directory(directory)
    if folder.exists() and (not folder.is_dir() or {x.name for x in folder.iterdir()} - {DRAFTER, WEIGHTS}):
        raise UserError(f"{folder} exists and is no drafter directory: choose a new one")
    proposer = configs.build(config)
    _check_shapes(f"the parameters of {type(proposer).__name__}", named_leaves(params), proposer, target)
    described = {
        "drafter": json.loads(configs.to_json(config)),
        "target": dataclasses.asdict(Identity.of(target, path)),
    }
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DRAFTER).unlink(missing_ok=True)
        safetensors.numpy.save_file(arrays, folder / WEIGHTS, metadata={"format": "flax"})
        # Last: a directory with a description is complete.
        files.write_atomically(folder / DRAFTER, json.dumps(described, indent=2) + "\n")
    except Exception as error:
        needed = sum(array.nbytes for array in arrays.values())
        raise files.write_failure(error, f"drafter {folder}", folder, needed) from error


def find_drafter(name: str, target: Loaded, step: int | None = None) -> LoadedDrafter:
    """The drafter called `name`: one that needs no training (`prompt_lookup`, `submodel`), the config of such a one
    (`configs/aded.py:tiny`), or a path for `load_drafter`.

    Raises:
        UserError: there is none, or the config is of something that is trained first.
    """
    if name in UNTRAINED or name.partition(":")[0].endswith(".py"):
        config = configs.of(UNTRAINED[name]) if name in UNTRAINED else configs.load_config(name)
        if config.get("cls") not in {f"{kind.__module__}:{kind.__qualname__}" for kind in UNTRAINED.values()}:
            raise UserError(
                f"{name} is to be trained first: python -m experiments.train --config={name} --workdir=...; then give "
                "the workdir"
            )
        proposer = configs.build(config)
        params: PyTree = ()
        if hasattr(proposer, "create"):
            params = proposer.create(jax.random.key(0), Target(target.params, target.model))
        return _checked(name, LoadedDrafter(proposer, params, config, None), target)
    if not expand(name).exists():
        close = nearest(name, UNTRAINED)
        hint = (
            f"did you mean {close}?"
            if close
            else f"give a run, a drafter directory, or {', '.join(UNTRAINED)}"
        )
        raise UserError(f"no drafter {name}; {hint}")
    return load_drafter(name, target, step)


def load_drafter(path: str | os.PathLike[str], target: Loaded, step: int | None = None) -> LoadedDrafter:
    """The drafter of a drafter directory or of a run of `DrafterTraining` (its newest checkpoint, or that of
    `step`), for decoding with `target`. Another model, as `load_model` reads it, becomes a `DraftModel`.

    Raises:
        UserError: no such directory; damaged files; a drafter of another vocabulary, tokenizer or target; one that
            drafts more than the target's context holds.
    """
    folder = files.local_directory(path)
    if (folder / DRAFTER).exists():
        if step is not None:
            raise UserError(f"{folder} is a drafter directory, with one set of parameters: no step {step}")
        return _checked(str(path), _load_directory(folder, target), target)
    if not (folder / CONFIG).exists():
        what = "is neither" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: a drafter directory ({DRAFTER}) or a run or model ({CONFIG})")
    node = read_config(folder / CONFIG).get("task")
    if not isinstance(node, ConfigDict) or node.get("cls") != TRAINING:
        return _checked(str(path), _draft_model(folder, target, step), target)
    task = configs.build(node, "config.task")
    params, _ = read_checkpoint(folder, jax.eval_shape(task.init, jax.random.key(0)), step)
    # The target as it was during the run, whatever may lie at its path today.
    trained_for = Identity.of(dataclasses.replace(task.loaded, params=params["target"]), node.target)
    found = LoadedDrafter(task.drafter, params["drafter"], node.drafter, trained_for)
    return _checked(str(path), found, target)


def target_path(name: str) -> str | None:
    """Where the target of a drafter directory or of a run of `DrafterTraining` was; None for everything else."""
    folder = expand(name)
    if (folder / DRAFTER).exists():
        return _described(folder)[1].path
    node = read_config(folder / CONFIG).get("task") if (folder / CONFIG).exists() else None
    return node.target if isinstance(node, ConfigDict) and node.get("cls") == TRAINING else None


def _draft_model(folder: Path, target: Loaded, step: int | None) -> LoadedDrafter:
    loaded = load_model(folder, step)
    if not hasattr(loaded.model, "extend"):
        raise UserError(f"{folder} holds a {type(loaded.model).__name__}, which does not decode text")
    model, params = unscan_layers(loaded.model, loaded.params)
    check_draft(model, Target(target.params, target.model))
    if (tokenizer := loaded.tokenizer) is not None and target.tokenizer is not None:
        _check_tokenizer(str(folder), tokenizer.fingerprint, target.tokenizer.fingerprint, "other text")
    proposer = DraftModel(model)
    return LoadedDrafter(proposer, params, capture(proposer), None)


def _described(folder: Path) -> tuple[ConfigDict, Identity]:
    try:
        described = json.loads((folder / DRAFTER).read_text(encoding="utf-8"))
        return configs.from_json(json.dumps(described["drafter"])), Identity(**described["target"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / DRAFTER} is not the description of a drafter: {error}") from None


def _load_directory(folder: Path, target: Loaded) -> LoadedDrafter:
    import safetensors
    import safetensors.numpy

    config, identity = _described(folder)
    proposer = configs.build(config, str(folder / DRAFTER))
    _check_identity(str(folder), identity, target)  # before shapes, which would say the same less clearly
    try:
        arrays = safetensors.numpy.load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"{folder / WEIGHTS} does not exist") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS} is not an intact safetensors file: {error}") from None
    wanted = _check_shapes(str(folder / WEIGHTS), arrays, proposer, target)
    leaves = [jax.numpy.asarray(arrays[name]) for name in named_leaves(wanted)]
    params = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    return LoadedDrafter(proposer, params, config, identity)


def _check_shapes(where: str, found: dict[str, Any], proposer: Proposer, target: Loaded) -> PyTree:
    """The shapes that the drafter's parameters have for the target; raises where those found differ."""

    def create(key: jax.Array, params: PyTree) -> PyTree:
        return proposer.create(key, Target(params, target.model))

    wanted = jax.eval_shape(create, jax.random.key(0), target.params) if hasattr(proposer, "create") else ()
    if difference := files.mismatches(found, named_leaves(wanted), where):
        raise UserError(f"{where} do not fit the drafter's config: {difference}")
    return wanted


def _checked(name: str, found: LoadedDrafter, target: Loaded) -> LoadedDrafter:
    if found.identity is not None:
        _check_identity(name, found.identity, target)
    size, levels, context = found.proposer.size, found.proposer.levels, target.model.max_length
    if max(size, levels) > context:
        raise UserError(
            f"{name} drafts {size} nodes on {levels} levels, and the target's context is {context} tokens: give it "
            "a smaller tree"
        )
    return found


def _check_identity(name: str, trained_for: Identity, target: Loaded) -> None:
    here = Identity.of(target, "")
    if here.vocab_size != trained_for.vocab_size:
        raise UserError(
            f"{name} drafts from a vocabulary of {trained_for.vocab_size} tokens, and the target has "
            f"{here.vocab_size}: it was trained for {trained_for.path}"
        )
    if here.tokenizer is not None and trained_for.tokenizer is not None:
        _check_tokenizer(name, trained_for.tokenizer, here.tokenizer, trained_for.path)
    if here.fingerprint != trained_for.fingerprint:
        raise UserError(
            f"{name} was trained for another target, {trained_for.path} with fingerprint "
            f"{trained_for.fingerprint}, not {here.fingerprint}: decode that one, or train a drafter for this one"
        )


def _check_tokenizer(name: str, its: str, here: str, path: str) -> None:
    if its != here:
        raise UserError(
            f"{name} was trained with another tokenizer than the target's ({its[:12]}, not {here[:12]}), for {path}"
        )
