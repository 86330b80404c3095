"""The same numbers and texts as the harness's own adapter for transformers gives on the same weights."""

import pytest
from tokenizers import processors

from research.data.tokenizer import train
from research.interop.huggingface import load

_REASON = "parity with the harness needs lm_eval, torch, transformers and accelerate: extras eval and parity"
pytest.importorskip("lm_eval", reason=_REASON)
torch = pytest.importorskip("torch", reason=_REASON)
transformers = pytest.importorskip("transformers", reason=_REASON)
pytest.importorskip("accelerate", reason=_REASON)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from research.interop.lm_eval import HarnessModel, adds_bos  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog; 12 boxing wizards jump. "


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[HFLM, HarnessModel]:
    """The harness's adapter and ours, around one Qwen 3 of random weights that takes 40 tokens."""
    folder = tmp_path_factory.mktemp("qwen3")
    backend = train([TEXT], vocab_size=280).backend
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    backend.encode_special_tokens = False
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    config = transformers.Qwen3Config(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    network = transformers.Qwen3ForCausalLM(config).eval()
    network.save_pretrained(folder)
    theirs.save_pretrained(folder)
    model, variables, tokenizer = load(folder)
    reference = HFLM(pretrained=network, tokenizer=theirs, batch_size=2, device="cpu")
    bos = adds_bos(tokenizer)
    return reference, HarnessModel(model, variables["params"], tokenizer, batch_size=2, bos=bos)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=x, idx=i) for i, x in enumerate(arguments)]


def test_loglikelihood(both):
    pairs = [
        ("The quick", " brown fox"),
        ("", "lazy dog"),
        ("jumps over ", "12"),
        ("The lazy dog", " 1"),
        ("The lazy dog", " 2"),
        (TEXT * 3, "The wizards"),  # longer than the context
    ]
    theirs, ours = (lm.loglikelihood(requests("loglikelihood", *pairs)) for lm in both)
    for (score, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(expected, abs=2e-4)
        assert greedy == expected_greedy


def test_rolling(both, monkeypatch):
    texts = [(TEXT * 3,), (TEXT[:20],), (TEXT,)]
    reference, model = both
    ours = model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    # Their adapter puts <bos> before the text and then predicts that, too, from another <bos>.
    encode = reference.tok_encode
    monkeypatch.setattr(reference, "tok_encode", lambda text: encode(text, add_special_tokens=False))
    theirs = reference.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert ours == pytest.approx(theirs, abs=5e-4)


def test_generation(both):
    reference, model = both
    free = {"until": [], "max_gen_toks": 12, "do_sample": False}
    contexts = ["The quick", "12", "boxing wizards jump over the lazy dog"]
    theirs = reference.generate_until(requests("generate_until", *((x, dict(free)) for x in contexts)))
    assert len(set(theirs)) == len(contexts)
    stop = next(character for character in theirs[0][1:] if character.isprintable())
    cases = [(x, dict(free)) for x in contexts] + [(contexts[0], {**free, "until": [stop]})]
    theirs = reference.generate_until(requests("generate_until", *((x, dict(o)) for x, o in cases)))
    ours = model.generate_until(requests("generate_until", *((x, dict(o)) for x, o in cases)))
    assert ours == theirs
    assert len(ours[-1]) < len(ours[0])
