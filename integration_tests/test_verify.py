"""`sinkprune verify` as a user runs it: report, limits and exit codes, bad input, and the page in a real browser."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from command_line import run_here, run_process
from safetensors.torch import load_file, save_file
from sparse_models import prune_2_of_4

from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def refused(message, *arguments, output):
    done = run_here("verify", *arguments, "--output", output)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sinkprune: ")
    assert message in last
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """tiny-llada with half of each group of four removed by magnitude, sparse on disk."""
    folder = tmp_path_factory.mktemp("verify")
    model = load_model(EMBEDDED_MODEL)
    prune_2_of_4(model)
    model.save_pretrained(folder / "dense")
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder / "dense")
    convert_checkpoint(folder / "dense", folder / "sparse", "sparse-24-bitmask", progress=False)
    return folder / "sparse"


@pytest.fixture(scope="module")
def report(pruned):
    output = pruned.parent / "report"
    done = run_process("verify", EMBEDDED_MODEL, pruned, "--output", output, "--quick", "--max-size-ratio", 0.9)
    assert done.returncode == 0, done.stderr
    assert "ELBO perplexity" in done.stdout
    assert "--max-size-ratio 0.9" in done.stdout
    return output


def test_the_report_holds_quality_samples_size_speed_and_sinks(report, pruned):
    names = {path.name for path in report.iterdir()}
    plots = {"perplexity.png", "agreement.png", "speed.png", "sparsity.png"}
    assert names >= plots | {"report.json", "report.html", "sinkprune_provenance.json", "sinks-dense", "sinks-pruned"}
    content = json.loads((report / "report.json").read_text())
    assert (content["schema"], content["schema_version"]) == ("sinkprune.verify", 2)
    assert content["passed"] is True
    quality = content["quality"]
    assert quality["ratio_low"] < quality["ratio"] < quality["ratio_high"]
    # Magnitude 2:4 costs tiny-llada some 25 %; the sign and the order are what matters here.
    assert 5 < quality["increase_percent"] < 100
    assert quality["ratio"] == pytest.approx(quality["elbo_pruned"] / quality["elbo_dense"], rel=0.02)
    assert len(quality["curve"]) == 4
    assert 0 < content["samples"]["agreement"] < 1
    assert content["sparsity"]["total"]["structure"] == "2:4"
    assert content["sparsity"]["total"]["sparsity"] == 0.5
    assert set(content["sparsity"]["natural_zeros_by_type"]) == set(content["sparsity"]["by_type"])
    size = content["size"]
    assert size["pruned"]["file_bytes"] == (pruned / "model.safetensors").stat().st_size
    assert size["pruned"]["format"] == "sparse-24-bitmask"
    assert size["pruned"]["memory_bytes"] == size["dense"]["memory_bytes"]
    assert size["memory_ratio"] == 1
    assert [(row["batch"], row["cache"]) for row in content["speed"]["rows"]] == [
        (batch, cache) for batch in (1, 4) for cache in ("none", "dual")
    ]
    assert all(0 < row["forward_share"] <= 1 for row in content["speed"]["rows"])
    speed = content["speed"]
    assert speed["repetitions"] >= 15
    assert 0 < speed["ratio_low"] <= speed["ratio"] <= speed["ratio_high"]
    assert speed["why_not_faster"].startswith("transformers runs 2:4 zeros with dense kernels")
    page = (report / "report.html").read_text()
    assert speed["verdict"] in page
    assert speed["why_not_faster"] in page
    assert "best of" not in page
    assert {"dense", "pruned"} == set(content["sinks"])


def test_a_model_against_itself_is_the_same(tmp_path):
    done = run_here("verify", EMBEDDED_MODEL, EMBEDDED_MODEL, "--output", tmp_path / "same", "--quick", "--seq-len", 64,
                    "--min-agreement", 1, "--max-ppl-increase", 0)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "same" / "report.json").read_text())
    assert content["quality"]["ratio"] == 1
    assert content["samples"]["along"] == [1.0] * 10
    assert content["size"]["file_ratio"] == 1
    # On real clocks; the chance of another verdict is below one percent (test_speed.py).
    assert content["speed"]["verdict"] == "no measurable difference"
    assert content["speed"]["why_not_faster"].startswith("both run the same dense kernels")
    assert "no measurable difference" in " ".join(done.stdout.split())


def test_a_missed_bar_is_exit_1_with_a_whole_report_and_further_models_beside(pruned, report, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 8, **sizes)).save_pretrained(tmp_path / "ar")
    tokenizer.save_pretrained(tmp_path / "ar")
    # The dense model as one that was recovered entirely, so that its column can't be taken for the pruned one's.
    recovered = copy_of(EMBEDDED_MODEL, tmp_path / "recovered")
    (recovered / "recovery").mkdir()
    shutil.copy(report / "speed.png", recovered / "recovery" / "loss.png")
    done = run_here("verify", EMBEDDED_MODEL, pruned, "--output", tmp_path / "out", "--quick", "--seq-len", 64,
                    "--max-ppl-increase", 0, "--min-speedup", 9, "--ar-model", tmp_path / "ar",
                    "--recovered", recovered)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "MISSED" in done.stdout
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["passed"] is False
    assert [(bar["name"], bar["passed"]) for bar in content["bars"]] == [
        ("max-ppl-increase", False),
        ("min-speedup", False),
    ]
    assert content["bars"][1]["value"] == content["speed"]["ratio_low"]
    assert set(content["sinks"]) == {"dense", "pruned", "autoregressive"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "missed" in page
    third = content["recovered"]
    assert (third["name"], third["quality"]["ratio"], third["samples"]["agreement"]) == ("recovered", 1.0, 1.0)
    row = next(line for line in done.stdout.splitlines() if line.startswith("increase over dense"))
    increases = re.findall(r"([+-]\d+\.\d) %", row)
    assert (float(increases[0]) > 5, increases[1]) == (True, "+0.0")
    assert 'alt="Training and held-out loss of the recovery"' in page
    cells = re.search(r"<th>same tokens as dense</th><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td>", page)
    assert cells
    assert (cells[1], cells[3]) == ("100.0 %", "100.0 %")
    assert cells[2] != "100.0 %"


def copy_of(source, target):
    target.mkdir()
    for file in source.iterdir():
        shutil.copy(file, target / file.name)
    return target


def test_verify_refuses_bad_input_before_it_writes(pruned, report, tmp_path):
    out = tmp_path / "out"
    refused("has no config.json", EMBEDDED_MODEL, tmp_path, output=out)
    refused("backend 'tensorrt' is unknown", EMBEDDED_MODEL, pruned, "--backend", "tensorrt", output=out)
    refused("--min-agreement 2.0 is out of range", EMBEDDED_MODEL, pruned, "--min-agreement", 2, output=out)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused("empty.txt", EMBEDDED_MODEL, pruned, "--dataset", empty, output=out)
    done = run_here("verify", EMBEDDED_MODEL, pruned, "--output", report)
    assert done.returncode == 2
    assert "choose another directory or pass --overwrite" in done.stderr

    other = copy_of(EMBEDDED_MODEL, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = "model.transformer.blocks.2.up_proj.weight"
    save_file(tensors | {name: torch.zeros(3, 4)}, other / "model.safetensors", metadata={"format": "pt"})
    refused(f"{name} is [512, 192]", EMBEDDED_MODEL, other, output=out)
    del tensors[name]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    refused(f"has no {name}", EMBEDDED_MODEL, other, output=out)
    save_file({"x.weight": torch.zeros(2)}, other / "model.safetensors", metadata={"format": "pt"})
    refused("no layer in common", EMBEDDED_MODEL, other, output=out)

    words = copy_of(EMBEDDED_MODEL, tmp_path / "words")
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("in one tokenizer and", EMBEDDED_MODEL, words, output=out)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: chromium)")
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(report, tmp_path, width):
    """No console errors, no network, figures and tables present, nothing wider than the window."""
    page = tmp_path / "report.html"
    probe = """<script>addEventListener('load', () => {
      const broken = [...document.images].filter(image => !image.complete || image.naturalWidth < 100).length;
      const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      const font = parseFloat(getComputedStyle(document.body).fontSize);
      const tables = document.querySelectorAll('table tbody tr').length;
      document.title = `images=${document.images.length} broken=${broken} wide=${wide} rows=${tables} font=${font} ` +
        `requests=${performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length} ` +
        `width=${innerWidth}`;
    });</script>"""
    page.write_text((report / "report.html").read_text() + probe)
    frame = tmp_path / "frame.html"
    # Chromium's own window isn't made narrower than about 500 pixels; a frame can be as narrow as needed.
    frame.write_text(
        f"<iframe id=f src='report.html' style='width:{width}px;height:2000px;border:0'></iframe>"
        "<script>f.onload = () => setTimeout(() => document.title = f.contentDocument.title, 300)</script>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               "--enable-logging=stderr", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1400,2000", "--dump-dom", frame.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    found = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", title)}
    assert found["images"] == 6
    assert found["broken"] == found["wide"] == found["requests"] == 0
    # 8 answers, 4 speeds, 2 sizes, 7 module types.
    assert found["rows"] == 21
    assert found["font"] >= 14
    assert found["width"] == width
