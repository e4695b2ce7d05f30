"""Reading a machine from its files: quotas of both cgroup versions, limits, features; and bytes of known shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from haomiao.measure import machine
from haomiao.measure.shapes import SHAPES


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAOMIAO_THREADS", raising=False)
    assert 1 <= machine.default_threads() <= machine.describe_machine().allowed
    monkeypatch.setenv("HAOMIAO_THREADS", "3")
    assert machine.default_threads() == 3


def test_an_empty_machine_is_unknown_but_described(tmp_path: Path) -> None:
    found = machine.describe_machine(tmp_path)
    assert found.quota is None
    assert found.memory_limit_bytes is None
    assert found.huge_pages is None
    assert found.features == ()
    assert found.as_dict()["allowed"] >= 1


def test_cgroup_v2_takes_the_tightest_of_all_levels(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
            "sys/fs/cgroup/outer/inner/memory.max": "2000000000\n",
            "sys/fs/cgroup/outer/memory.max": "max\n",
        },
    )
    found = machine.describe_machine(root)
    assert found.quota == 1.5
    assert found.memory_limit_bytes == 2_000_000_000


def test_cgroup_v1(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    found = machine.describe_machine(root)
    assert found.quota == 0.5
    assert found.memory_limit_bytes is None


@pytest.mark.parametrize("text", ["", "max", "0 0", "x y", "100000 0", "-5 100000"])
def test_quota_files_that_make_no_sense_are_no_quota(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text})
    assert machine.describe_machine(root).quota is None


def test_processor_memory_and_huge_pages(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "model name\t: Some CPU 9000\nflags\t\t: fpu sse2 avx2 fma avx512f\nmodel name\t: Two\n",
            "proc/meminfo": "MemTotal:       1000 kB\nMemAvailable:    600 kB\nHugePages_Total:   0\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        },
    )
    found = machine.describe_machine(root)
    assert found.processor == "Some CPU 9000"
    assert found.features == ("avx2", "fma", "avx512f")
    assert (found.memory_bytes, found.available_bytes) == (1_024_000, 614_400)
    assert found.huge_pages == "madvise"


def test_shapes_have_the_published_numbers_of_parameters() -> None:
    assert SHAPES["qwen2.5-0.5b"].parameters == pytest.approx(0.494e9, rel=0.002)
    assert SHAPES["llama-3.2-1b"].parameters == pytest.approx(1.236e9, rel=0.002)
    assert SHAPES["smollm2-135m"].parameters == pytest.approx(0.1345e9, rel=0.002)
    assert SHAPES["llama-2-7b"].parameters == pytest.approx(6.738e9, rel=0.002)


def test_bytes_of_a_step() -> None:
    shape = SHAPES["llama-2-7b"]
    int4, int8 = shape.bytes_per_step("int4"), shape.bytes_per_step("int8")
    assert int8 - int4 == shape.body_weights / 2
    assert int8 == pytest.approx((shape.body_weights + shape.head_weights) * 1.0625)
    assert shape.bytes_per_step("int8", group=128) < int8
