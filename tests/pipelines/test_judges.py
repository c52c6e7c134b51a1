"""A judge's scores against one call for each token, and what is refused as a judge."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from md4.errors import UserError
from pipelines.judges import Judge
from tests.pipelines.small_judge import WINDOW, gpt2, tokenizer, write_judge

TEXTS = [
    "the cat sat",
    "a dog ate the rat that lay in the malt of the house that jack built",
    "zebras, quite unlike cats, never sit on a mat; nor would we know of it",
    "x",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "tiny")


@torch.inference_mode()
def by_token(judge: Judge, text: str) -> list[float]:
    """Nats of each scored token, from one call a token on the context that the stated convention gives it."""
    ids = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
    sequence = ids if judge.bos is None else [judge.bos, *ids]
    window, stride = judge.facts.judge_window, judge.facts.judge_stride
    nats = []
    for place in range(1, len(sequence)):
        further = max(0, math.ceil((place + 1 - window) / stride))
        begin = max(0, min(window + further * stride, len(sequence)) - window)
        logits = judge.model(input_ids=torch.tensor([sequence[begin:place]])).logits[0, -1]
        nats.append(-float(torch.log_softmax(logits.double(), 0)[sequence[place]]))
    return nats


@pytest.mark.parametrize("bos", ["<s>", None])
def test_scores_are_those_of_one_call_a_token(tmp_path, bos):
    """Short texts, and some of several windows."""
    judge = Judge.load(str(write_judge(tmp_path / "judge", bos=bos)))
    scores = judge.score(TEXTS, batch_size=3)
    expected = [by_token(judge, text) for text in TEXTS]
    assert max(map(len, expected)) > 2 * WINDOW
    assert scores.tokens.tolist() == [len(nats) for nats in expected]
    assert scores.tokens[3] == (0 if bos is None else 1)
    assert scores.nats == pytest.approx([sum(nats) for nats in expected], rel=1e-5)
    assert judge.facts.judge_first_token == ("not scored" if bos is None else "scored after <s>")


def test_company_changes_nothing(folder):
    judge = Judge.load(str(folder))
    alone, together = (judge.score(TEXTS, features=True, batch_size=size) for size in (1, 8))
    assert np.allclose(alone.nats, together.nats, rtol=1e-6)
    assert alone.features is not None
    assert together.features is not None
    assert np.allclose(alone.features, together.features, atol=1e-5)


def test_features_are_the_last_hidden_state(folder):
    """At the last token, or at the last one of the first window."""
    judge = Judge.load(str(folder))
    features = judge.score(TEXTS, features=True).features
    assert features is not None
    for text, found in zip(TEXTS, features, strict=True):
        hidden = judge.model.transformer(judge.encode(text)[None, :WINDOW]).last_hidden_state
        assert np.allclose(found, hidden[0, -1].detach().numpy(), atol=1e-5)
    silent = Judge("silent", gpt2(len(tokenizer())), tokenizer(bos=None))
    with pytest.raises(UserError, match="text 1 is empty"):
        silent.score(["the cat", ""], features=True)


def test_the_hash_is_of_weights_and_words(tmp_path, folder):
    first = Judge.load(str(folder)).facts
    assert Judge.load(str(write_judge(tmp_path / "again"))).facts.judge_sha256 == first.judge_sha256
    assert Judge.load(str(write_judge(tmp_path / "other", seed=1))).facts.judge_sha256 != first.judge_sha256
    assert Judge.load(str(write_judge(tmp_path / "mute", bos=None))).facts.judge_sha256 != first.judge_sha256
    assert (first.judge, first.judge_window, first.judge_stride) == ("tiny", WINDOW, WINDOW // 2)


def test_what_is_no_judge_is_refused(tmp_path):
    folder = write_judge(tmp_path / "judge")
    with pytest.raises(UserError, match=r"'runs/no/judge': there is no such folder"):
        Judge.load("runs/no/judge")
    with pytest.raises(UserError, match=r"it has no config\.json"):
        Judge.load(str(tmp_path))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != "transformer.h.1.mlp.c_fc.weight"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its tensors are missing, transformer\.h\.1\.mlp\.c_fc\.weight"):
        Judge.load(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")  # pickled: not even looked at
    with pytest.raises(UserError, match="can't be read"):
        Judge.load(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    with pytest.raises(UserError, match="can't be read"):
        Judge.load(str(folder))


def test_a_model_that_sees_the_future_is_refused():
    words = tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    both_ways = BertLMHeadModel(BertConfig(vocab_size=len(words), initializer_range=0.4, **sizes))
    with pytest.raises(UserError, match="'bert' is no causal language model"):
        Judge("bert", both_ways, words)
    with pytest.raises(UserError, match=f"its tokenizer has {len(words)} tokens, its model knows 290"):
        Judge("small", gpt2(290), words)


def test_nan_is_no_score(folder):
    judge = Judge.load(str(folder))
    judge.model.transformer.wte.weight.data[:] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        judge.score(["the cat"])
