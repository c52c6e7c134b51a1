"""Parity with the reference, and that the check of it can fail."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.golden import VECTORS
from tests.golden.__main__ import check, main
from tests.shared import shared

FILES = sorted(path.name for path in VECTORS.glob("*.npz"))


@pytest.mark.parametrize("name", FILES)
def test_agrees_with_the_reference(name):
    outcome, reason = check(VECTORS / name)
    assert outcome == "PASS", reason


def test_agrees_with_all_vectors(capsys):
    assert main([str(shared("reference"))]) == 0
    passed, failed, skipped = re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1])
    assert int(passed) >= 40
    assert (int(failed), int(skipped)) == (0, 0)


MUTATIONS = [
    ("schedules.npz", "cosine:weight", lambda a: a * 1.003),
    ("schedules.npz", "poly2:logsnr", lambda a: -a),
    ("schedules.npz", "vec:weight", lambda a: a * 1.001),
    ("genmd4_loss_1.npz", "loss_diff_1_nats", lambda a: a * 1.001),
    ("genmd4_loss_1.npz", "out:loss_nelbo", lambda a: a * 1.001),
    ("genmd4_loss_1.npz", "out:loss", lambda a: a * 1.001),
    ("genmd4_loss_1.npz", "grad_w:rloo", lambda a: -a),
    ("genmd4_loss_1.npz", "grad_w:loss_recon", lambda a: 0 * a),
    ("antithetic_times.npz", "t_8", lambda a: a[::-1]),
    ("timestep_embedding.npz", "emb_16", lambda a: np.concatenate((a[:, 8:], a[:, :8]), axis=1)),
    ("sampling_grids.npz", "cosine_8_t", lambda a: a + 1e-5),
    ("topp_mask.npz", "masked_0.8", lambda a: np.where(a == a.max(1, keepdims=True), -1e7, a)),
    ("backbone_text_time.npz", "logits", lambda a: a * 1.001),
    ("backbone_text_time.npz", "logits_scalar_t", lambda a: a[::-1]),
    ("backbone_text_time.npz", "mid:classifier/Transformer_0/TransformerBlock_0:TransformerBlock", lambda a: a * 1.001),
    ("backbone_text_time.npz", "param:classifier/Transformer_0/TransformerBlock_1/attention/wk/kernel", lambda a: a.T),
    ("md4_loss_0_text_time_linear_cont.npz", "weight", lambda a: a * 1.001),
    ("md4_loss_0_text_time_linear_cont.npz", "out:loss", lambda a: a * 1.001),
    ("md4_loss_0_text_time_linear_cont.npz", "grad:classifier/Transformer_0/Dense_2/kernel", lambda a: a * 1.001),
    ("md4_loss_1_text_time_cosine_cont.npz", "grad_norm", lambda a: a * 1.001),
    ("md4_loss_5_text_time_linear_disc.npz", "t_used", lambda a: a - 1e-3),
    ("md4_loss_6_text_time_cosine_disc.npz", "loss_diff_per_example_nats", lambda a: a * 1.01),
    ("sampler_text_time_topp_uniform_linear_p0.8.npz", "probs", lambda a: a * 1.001),
    ("sampler_text_time_topp_uniform_linear_p0.8.npz", "unmask_prob", lambda a: a * 1.001),
    ("sampler_text_time_mean_cosine_linear.npz", "decode_out", lambda a: (a + 1) % 27),
    ("sampler_text_time_mean_cosine_linear.npz", "s", lambda a: a + 1e-4),
]


def copy_of(folder: Path, name: str, **replaced) -> Path:
    """A copy of a vector file, and of the parameters it needs, with some arrays replaced (None takes one out)."""
    with np.load(VECTORS / name) as file:
        arrays = {key: file[key] for key in file.files}
    arrays |= replaced
    np.savez(folder / name, **{key: array for key, array in arrays.items() if array is not None})
    if name != "backbone_text_time.npz":
        shutil.copy(VECTORS / "backbone_text_time.npz", folder)
    return folder / name


@pytest.mark.parametrize(("name", "array", "mutate"), MUTATIONS, ids=[f"{m[0][:12]}-{m[1][-12:]}" for m in MUTATIONS])
def test_a_wrong_number_fails(name, array, mutate, tmp_path):
    with np.load(VECTORS / name) as file:
        wrong = mutate(file[array])
    outcome, reason = check(copy_of(tmp_path, name, **{array: wrong}))
    assert outcome == "FAIL", reason


def test_not_a_number_fails(tmp_path):
    with np.load(VECTORS / "md4_loss_1_text_time_cosine_cont.npz") as file:
        logits = file["logits"].copy()
    logits[0, 0, 0] = np.nan
    outcome, reason = check(copy_of(tmp_path, "md4_loss_1_text_time_cosine_cont.npz", logits=logits))
    assert outcome == "FAIL"
    assert "inf" in reason


def test_a_missing_or_misshapen_array_fails(tmp_path):
    name = "md4_loss_1_text_time_cosine_cont.npz"
    assert check(copy_of(tmp_path, name, weight=None)) == ("FAIL", "it lacks the array 'weight'")
    outcome, reason = check(copy_of(tmp_path, name, weight=np.zeros(3, dtype=np.float32)))
    assert outcome == "FAIL"
    assert "weight has shape [3] in the file, [8] here" in reason


def test_what_a_file_holds_is_told_without_its_name(tmp_path):
    """Under other names, the parameters' too."""
    for i, name in enumerate(FILES):
        with np.load(VECTORS / name) as file:
            arrays = {key: file[key] for key in file.files}
        meta = json.loads(str(arrays["meta_json"]))
        if "params_file" in meta:
            arrays["meta_json"] = np.array(json.dumps(meta | {"params_file": "other.npz"}))
        other = "other" if name == "backbone_text_time.npz" else f"vectors_{i}"
        np.savez(tmp_path / f"{other}.npz", **arrays)
    assert main([str(tmp_path)]) == 0


def test_verdicts_are_counted_and_decide_the_exit_code(tmp_path, capsys):
    copy_of(tmp_path, "md4_loss_1_text_time_cosine_cont.npz")
    assert main([str(tmp_path)]) == 0
    np.savez(tmp_path / "something.npz", apples=np.arange(3))
    np.savez(tmp_path / "genmd4_loss_9.npz", xt_1=np.arange(3), xt_2=np.arange(3))
    (tmp_path / "sampler_broken.npz").write_bytes(b"PK\x03\x04 and then nothing")
    np.savez(tmp_path / "sampler_empty.npz")
    capsys.readouterr()
    assert main([str(tmp_path)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "2 passed, 3 failed, 1 skipped"
    assert [line[:4] for line in lines] == ["PASS", "FAIL", "PASS", "FAIL", "FAIL", "SKIP"]
    assert "allowed" in lines[0]
    assert "it lacks the array 'logits_1'" in lines[1]
    assert "is not a readable .npz file" in lines[3]
    assert "its meta_json lacks 'params_file'" in lines[4]
    assert "none of the known kinds" in lines[5]


def test_missing_parameters_fail_with_their_name(tmp_path):
    copy_of(tmp_path, "md4_loss_1_text_time_cosine_cont.npz")
    (tmp_path / "backbone_text_time.npz").unlink()
    outcome, reason = check(tmp_path / "md4_loss_1_text_time_cosine_cont.npz")
    assert outcome == "FAIL"
    assert "there is no file" in reason
    assert "backbone_text_time.npz" in reason


def test_nothing_to_check_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no *.npz file" in capsys.readouterr().err
    assert main([str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err
