"""The dense model's predictions on disk."""

import torch
from recovery_cases import small_model

from sinkprune_plugin.diffusion import resolve_diffusion, top_predictions
from sinkprune_plugin.recovery import teacher
from sinkprune_plugin.recovery.noisy_windows import NoisyWindows, batch_of
from sinkprune_plugin.recovery.teacher import LiveTeacher, StoredTeacher, store_predictions, stored_bytes


def make(vocab=60):
    model = small_model(vocab_size=vocab)
    spec = resolve_diffusion(model.config)
    windows = torch.randint(3, vocab, (6, 16), generator=torch.Generator().manual_seed(0))
    return model, spec, NoisyWindows(windows, spec, draws=10, strata=4, seed=0)


def test_stored_predictions_are_those_of_the_model(tmp_path, monkeypatch):
    model, spec, draws = make()
    # A file holds 256 draws; with 4 the ten lie in three files.
    monkeypatch.setattr(teacher, "DRAWS_PER_FILE", 4)
    store_predictions(model, draws, spec, tmp_path, top_k=5, batch_size=3, progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    batch = batch_of([draws[index] for index in (9, 0, 5)])
    found = StoredTeacher(tmp_path)(batch)
    wanted = top_predictions(LiveTeacher(model, spec)(batch), 5)
    assert torch.equal(found.ids, wanted.ids)
    # Kept as float16: 11 bits of a number up to 16.
    assert torch.allclose(found.log_probabilities, wanted.log_probabilities, rtol=1e-3)
    assert bool(found.remainder().isfinite().all())


def test_an_interrupted_store_goes_on(tmp_path, monkeypatch):
    model, spec, draws = make()
    monkeypatch.setattr(teacher, "DRAWS_PER_FILE", 4)
    store_predictions(model, draws, spec, tmp_path, top_k=5, batch_size=3, progress=False)
    kept, lost = tmp_path / "predictions-00000.safetensors", tmp_path / "predictions-00001.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    # What an interruption leaves behind has another name and is written again.
    (tmp_path / "predictions-00001.tmp").write_bytes(content[:100])
    time = kept.stat().st_mtime_ns
    store_predictions(model, draws, spec, tmp_path, top_k=5, batch_size=3, progress=False)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == time


def test_the_estimate_of_their_size(tmp_path):
    model, spec, draws = make()
    store_predictions(model, draws, spec, tmp_path, top_k=5, batch_size=5, progress=False)
    corrupted = sum(int(draws[index]["corrupted"].sum()) for index in range(len(draws)))
    # Half of the tokens on average: 80 of 160.
    assert stored_bytes(draws, 5) == 80 * 5 * 6
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    header = 200 * len(draws)
    assert corrupted * 5 * 6 <= size <= corrupted * 5 * 6 + header
