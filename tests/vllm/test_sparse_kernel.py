"""The choice of the 2:4 kernel: shapes, timing, algorithms, and the file that keeps it. The kernel is emulated."""

import importlib
import sys

import pytest
import torch
from checkpoint_maker import two_of_four

from sinkprune_plugin.vllm import kernel_choices, sparse_kernel
from sinkprune_plugin.vllm.kernel_choices import KernelChoices
from sinkprune_plugin.vllm.sparse_kernel import LAUNCHES, MEASURED_ROWS, KernelChoice


def test_neither_module_needs_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for module in (sparse_kernel, kernel_choices):
        source = importlib.util.find_spec(module.__name__)
        fresh = importlib.util.module_from_spec(source)
        monkeypatch.setitem(sys.modules, module.__name__, fresh)
        source.loader.exec_module(fresh)


def test_gains_and_losses_over_the_measured_rows():
    assert sparse_kernel.is_faster([1.0, 2.0, 4.0], [0.7, 1.3, 2.6])
    # Refused if its losses outweigh its gains, and for a gain within the noise.
    assert not sparse_kernel.is_faster([1.0, 1.0, 1.0], [2.5, 0.8, 0.7])
    assert not sparse_kernel.is_faster([1.0, 1.0, 1.0], [0.97, 0.98, 0.96])
    assert sparse_kernel.is_faster([1.0, 1.0, 1.0], [1.2, 0.7, 0.7])


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((4096, 4096), torch.bfloat16, True),
        ((12288, 4096), torch.float16, True),
        ((4096, 4096), torch.float32, False),
        ((4096, 4096), torch.int8, False),
        ((4096 + 16, 4096), torch.bfloat16, False),
        ((4096, 4096 + 32), torch.bfloat16, False),
        ((0, 64), torch.bfloat16, False),
    ],
)
def test_shapes_of_the_kernel(shape, dtype, fits):
    assert sparse_kernel.fits_kernel(shape, dtype) is fits


def test_only_two_of_four_is_compressed():
    weight = two_of_four(64, 128)
    assert sparse_kernel.is_two_of_four(weight)
    # As tensor parallelism cuts it: along the rows, and along whole groups of the columns.
    assert sparse_kernel.is_two_of_four(weight[:32])
    assert sparse_kernel.is_two_of_four(weight[:, 64:])
    weight[5, 8:11] = 1
    assert not sparse_kernel.is_two_of_four(weight)


def test_launches_are_timed_in_batches():
    launched, between = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(launched)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            between.append(end.at - self.at)
            # Milliseconds: the first batch compiles the kernel.
            return 1000.0 if len(between) == 1 else 0.5 * LAUNCHES

    assert sparse_kernel.seconds_per_launch(lambda: launched.append(1), Event) == pytest.approx(0.5e-3)
    assert between == [LAUNCHES] * 6


class Emulated:
    """cuSPARSELt with algorithms 0, 2, 5 and 7, of which 7 takes 256 rows of activations only."""

    found = {256: 7, 1024: 2, 4096: 5}  # noqa: RUF012
    speed = {"dense": 1.0, 0: 0.9, 2: 1.2, 5: 0.6, 7: 0.1}  # noqa: RUF012

    def __init__(self, monkeypatch):
        monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", self.product)
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", self.search)
        self.running = None

    def search(self, packed, dense, transpose_result):
        assert transpose_result
        return self.found[dense.shape[1]]

    def product(self, packed, dense, transpose_result, alg_id):
        if alg_id == 7 and dense.shape[1] != 256:
            raise RuntimeError("no such algorithm")
        self.running = alg_id
        return (packed @ dense).t()

    def seconds(self, run):
        self.running = "dense"
        run()
        return self.speed[self.running]


def measured(monkeypatch, **changes):
    emulated = Emulated(monkeypatch)
    emulated.speed = {**emulated.speed, **changes.pop("speed", {})}
    for name, value in changes.items():
        monkeypatch.setattr(torch, name, value)
    return sparse_kernel.measure(32, 64, torch.float32, "cpu", emulated.seconds)


def test_the_fastest_of_the_algorithms_that_take_all_sizes(monkeypatch):
    assert measured(monkeypatch) == KernelChoice(True, 5, (1.667,) * 3)


def test_dense_where_none_is_faster(monkeypatch):
    assert measured(monkeypatch, speed={"dense": 0.6}) == KernelChoice(False, 5, (1.0,) * 3)


def test_the_default_algorithm_where_torch_has_no_search(monkeypatch):
    def search(*operands, **options):
        raise RuntimeError("not supported by this build")

    assert measured(monkeypatch, _cslt_sparse_mm_search=search) == KernelChoice(True, 0, (1.111,) * 3)


def test_dense_where_the_kernel_runs_nothing(monkeypatch):
    def product(*operands, **options):
        raise RuntimeError("not supported on this GPU")

    assert measured(monkeypatch, _cslt_sparse_mm=product) == KernelChoice(False)


def never():
    pytest.fail("measured again")


def test_a_choice_is_made_once(tmp_path):
    path = tmp_path / "cache" / "choices.json"
    choice, other = KernelChoice(True, 5, (1.5, 1.2, 1.1)), KernelChoice(False)
    assert KernelChoices(path).get("a", lambda: choice) == choice
    assert KernelChoices(path).get("b", lambda: other) == other
    # In later processes.
    assert KernelChoices(path).get("a", never) == choice
    assert KernelChoices(path).get("b", never) == other
    assert [file.name for file in path.parent.iterdir()] == ["choices.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 1}', '{"a": {"sparse": "yes", "algorithm": 1, "gains": []}}', '{"a": {}}']
)
def test_a_damaged_file_is_measured_anew(text, tmp_path):
    path = tmp_path / "choices.json"
    path.write_text(text)
    choice = KernelChoice(True, 2, (1.5,))
    assert KernelChoices(path).get("a", lambda: choice) == choice
    assert KernelChoices(path).get("a", never) == choice


def test_a_directory_that_cannot_be_written_costs_the_file_only(tmp_path):
    (tmp_path / "file").write_text("")
    assert KernelChoices(tmp_path / "file" / "choices.json").get("a", lambda: KernelChoice(True)) == KernelChoice(True)


def test_what_a_choice_depends_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    shapes = [(64, 128, torch.bfloat16, "x"), (128, 64, torch.bfloat16, "x"), (64, 128, torch.float16, "x"),
              (64, 128, torch.bfloat16, "y")]  # fmt: skip
    keys = {kernel_choices.key_of(*shape) for shape in shapes}
    assert len(keys) == 4
    assert all(f"torch {torch.__version__}" in key and str(MEASURED_ROWS) in key for key in keys)
