from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from workbench.hardware import Device, Machine, _cgroup_memory, _cuda_bandwidth, _detect_ram, format_bytes, parse_bytes

GIB = 2**30
MIB = 2**20


def device(id_: int | str, **changes: object) -> Device:
    fields: dict[str, object] = {
        "name": "test",
        "total_bytes": 10 * GIB,
        "free_bytes": 8 * GIB,
        "reserved_bytes": GIB,
        "reserved_for": "the test",
        "bandwidth_bytes_per_s": None,
        "source": "made up",
    }
    return Device(id=id_, **{**fields, **changes})


def machine() -> Machine:
    return Machine(devices=[device("disk"), device(1), device("cpu"), device(0)])


class TestParseBytes:
    @pytest.mark.parametrize(
        ("size", "size_bytes"),
        [
            (0, 0),
            (1234, 1234),
            ("1234", 1234),
            ("0GiB", 0),
            ("20GiB", 21_474_836_480),  # 20 * 1024^3
            ("20GIB", 21_474_836_480),
            ("20gib", 21_474_836_480),
            ("13.5GiB", 14_495_514_624),  # 13.5 * 1024^3
            ("10GB", 10_000_000_000),
            ("10gB", 10_000_000_000),
            ("512MB", 512_000_000),
            ("300 MiB", 314_572_800),  # 300 * 1024^2
            (" 4 KiB ", 4096),
            ("4KB", 4000),
            ("1.5TiB", 1_649_267_441_664),  # 1.5 * 1024^4
            ("2TB", 2_000_000_000_000),
            (".5GB", 500_000_000),
            ("5.GB", 5_000_000_000),
        ],
    )
    def test_spellings(self, size: int | str, size_bytes: int) -> None:
        assert parse_bytes(size) == size_bytes

    @pytest.mark.parametrize("size", [7, "20GiB", "20GIB", "13.3GB", "0.7GB", "1.1MiB", "512MB", "9.99KB", "3KiB"])
    def test_agrees_with_accelerate(self, size: int | str) -> None:
        from accelerate.utils.modeling import convert_file_size_to_int

        assert parse_bytes(size) == convert_file_size_to_int(size)

    @pytest.mark.parametrize("size", [-1, "-1", "-2GiB", " -2 GiB"])
    def test_negative(self, size: int | str) -> None:
        with pytest.raises(ValueError, match="cannot be negative"):
            parse_bytes(size)

    @pytest.mark.parametrize(
        "size",
        [
            "lots",
            "",
            "GiB",
            "nan",
            "nanGiB",
            "infGB",
            "20G",
            "13.5",
            "1,5GiB",
            "1e3GB",
            "2 0GB",
            "9" * 400 + "GB",
            True,
            1.5,
            None,
            float("nan"),
        ],
    )
    def test_no_size(self, size: object) -> None:
        with pytest.raises(ValueError, match=r'is no size of memory: write bytes as .* "20GiB", "10GB" or "512MB"\.$'):
            parse_bytes(size)

    @pytest.mark.parametrize(
        ("size", "instead"), [("10Gb", "10GB"), ("10gb", "10GB"), ("512mb", "512MB"), ("1.5 kb", "1.5KB")]
    )
    def test_bits_are_refused(self, size: str, instead: str) -> None:
        with pytest.raises(ValueError, match=f'would mean bits to accelerate: write "{instead}" for bytes'):
            parse_bytes(size)

    def test_that_accelerate_still_reads_a_final_b_as_bits(self) -> None:
        from accelerate.utils.modeling import convert_file_size_to_int

        assert convert_file_size_to_int("10Gb") == 10 * 10**9 // 8


class TestFormatBytes:
    @pytest.mark.parametrize(
        ("n", "text"),
        [
            (0, "0 GiB"),
            (1, "1 KiB"),
            (4096, "4 KiB"),
            (MIB - 1, "1 MiB"),  # 1023.999 KiB is no "1024 KiB"
            (57 * MIB, "57 MiB"),
            (102 * MIB, "102 MiB"),
            (1023 * MIB, "1023 MiB"),
            (GIB - 1, "1.0 GiB"),  # no "1024 MiB"
            (14_495_514_624, "13.5 GiB"),
            (2000 * GIB, "2000.0 GiB"),
            (-3 * GIB, "-3.0 GiB"),
        ],
    )
    def test_spelling(self, n: int, text: str) -> None:
        assert format_bytes(n) == text

    def test_what_is_written_is_read_back_to_within_the_last_digit(self) -> None:
        for exponent in range(46):
            for n in (2**exponent, 2**exponent + 1, 3 * 2**exponent // 2, 2 ** (exponent + 1) - 1):
                # Half a digit (and the byte that reading cuts off), except for whole KiB, which are rounded up.
                digit = 0.05 * GIB if n >= 0.1 * GIB else MIB / 2 if n > 1023 * 1024 else 1023
                assert abs(parse_bytes(format_bytes(n)) - n) <= digit + 1

    def test_larger_is_never_written_as_smaller(self) -> None:
        sizes = [parse_bytes(format_bytes(round(1.01**i))) for i in range(3000)]
        assert sizes == sorted(sizes)


class TestDevice:
    @pytest.mark.parametrize(
        ("id_", "label"), [(0, "cuda:0"), (7, "cuda:7"), ("mps", "mps"), ("cpu", "cpu"), ("disk", "disk")]
    )
    def test_label(self, id_: int | str, label: str) -> None:
        assert device(id_).label == label

    def test_budget_is_what_is_free_less_the_reserve(self) -> None:
        assert device(0).budget_bytes == 7 * GIB  # 8 - 1
        assert device(0, free_bytes=GIB // 2).budget_bytes == 0

    @pytest.mark.parametrize("id_", [-1, True, "cuda:0", "gpu", None, 1.0])
    def test_bad_id(self, id_: object) -> None:
        with pytest.raises(
            ValueError, match=r'is no device id: use 0, 1, \.\.\. for a GPU, or "mps", "cpu" or "disk"\.'
        ):
            device(id_)

    @pytest.mark.parametrize("field", ["total_bytes", "free_bytes", "reserved_bytes"])
    @pytest.mark.parametrize("size", [-1, 1.5, "1GiB", True])
    def test_bad_size(self, field: str, size: object) -> None:
        with pytest.raises(ValueError, match=f"{field} of cuda:0 must be a whole number"):
            device(0, **{field: size})

    def test_more_free_than_there_is(self) -> None:
        with pytest.raises(ValueError, match=r"free_bytes of cpu .* must not exceed its total_bytes"):
            device("cpu", free_bytes=11 * GIB)

    def test_unknown_keyword_lists_the_valid_ones(self) -> None:
        with pytest.raises(TypeError, match=r"Device has no option 'total_byte'.*'total_bytes'.*reserved_for.*source"):
            device(0, total_byte=1)


class TestMachine:
    def test_devices_stand_in_accelerates_order(self) -> None:
        shuffled = [device("disk"), device(10), device("mps"), device(2), device("cpu")]
        assert [d.id for d in Machine(devices=shuffled).devices] == [2, 10, "mps", "cpu", "disk"]

    def test_equal_whatever_the_order_and_hashable(self) -> None:
        one, other = Machine(devices=(device(0), device("cpu"))), Machine(devices=[device("cpu"), device(0)])
        assert one == other
        assert hash(one) == hash(other)

    def test_needs_a_cpu(self) -> None:
        with pytest.raises(ValueError, match='needs a device with the id "cpu"'):
            Machine(devices=[device(0), device("disk")])

    def test_each_device_once(self) -> None:
        with pytest.raises(ValueError, match="cuda:0 was given twice"):
            Machine(devices=[device(0), device("cpu"), device(0)])

    def test_accelerators(self) -> None:
        assert [d.id for d in machine().accelerators] == [0, 1]
        assert Machine(devices=[device("cpu")]).accelerators == ()
        assert [d.id for d in Machine(devices=[device("cpu"), device("mps")]).accelerators] == ["mps"]

    @pytest.mark.parametrize("id_", [1, "1", "cuda:1"])
    def test_find_a_device(self, id_: int | str) -> None:
        assert machine().device(id_).id == 1

    def test_an_absent_device_lists_those_there_are(self) -> None:
        with pytest.raises(ValueError, match=r"^This machine has no cuda:5: it has cuda:0, cuda:1, cpu and disk\.$"):
            machine().device(5)
        with pytest.raises(ValueError, match=r"^The machine '16 GB laptop' has no cuda:0: it has cpu and disk\.$"):
            Machine.preset("16 GB laptop").device("cuda:0")
        with pytest.raises(ValueError, match=r"^This machine has no gpu: it has cpu\.$"):
            Machine(devices=[device("cpu")]).device("gpu")

    def test_budgets_leave_the_disk_out(self) -> None:
        assert machine().budgets() == {0: 7 * GIB, 1: 7 * GIB, "cpu": 7 * GIB}

    def test_unknown_keyword_lists_the_valid_ones(self) -> None:
        with pytest.raises(TypeError, match=r"Valid options: name, devices\."):
            Machine(device=[device("cpu")])
        with pytest.raises(TypeError, match=r"no option 'gpus'.* offload_folder, accelerators"):
            Machine.detect(gpus=False)


class TestMaxMemory:
    def test_none_is_the_budgets(self) -> None:
        assert machine().parse_max_memory(None) == machine().budgets()

    def test_sizes_are_read_and_put_in_accelerates_order(self) -> None:
        parsed = machine().parse_max_memory({"disk": "1TB", "cpu": "2GiB", 1: 5, 0: "10GB"})
        assert list(parsed.items()) == [(0, 10 * 10**9), (1, 5), ("cpu", 2 * GIB), ("disk", 10**12)]

    def test_a_device_left_out_is_not_used(self) -> None:
        assert machine().parse_max_memory({1: "20GiB"}) == {1: 20 * GIB}

    def test_the_callers_mapping_is_left_alone(self) -> None:
        given = {"cpu": "2GiB", "cuda:0": "1GiB"}
        assert machine().parse_max_memory(given) == {0: GIB, "cpu": 2 * GIB}
        assert given == {"cpu": "2GiB", "cuda:0": "1GiB"}

    @pytest.mark.parametrize("key", [0, "0", "cuda:0"])
    def test_spellings_of_a_gpu(self, key: int | str) -> None:
        assert machine().parse_max_memory({key: "1GiB"}) == {0: GIB}

    def test_agrees_with_accelerate(self) -> None:
        from accelerate.utils import get_max_memory

        given = {"disk": "100GB", "cpu": "30GiB"}
        theirs = get_max_memory(dict(given))
        assert list(machine().parse_max_memory(given).items()) == list(theirs.items())

    @pytest.mark.parametrize(
        ("max_memory", "sentence"),
        [
            ({"cpu": "lots"}, "max_memory for cpu: 'lots' is no size of memory"),
            ({1: "-2GiB"}, "max_memory for cuda:1: A size of memory cannot be negative"),
            ({0: -1}, "max_memory for cuda:0: A size of memory cannot be negative"),
            ({0: "10Gb"}, "max_memory for cuda:0: '10Gb' would mean bits"),
            ({0: None}, "max_memory for cuda:0: None is no size of memory"),
            ({5: "1GiB"}, "This machine has no cuda:5: it has cuda:0, cuda:1, cpu and disk"),
            ({-1: "1GiB"}, "This machine has no cuda:-1: it has"),
            ({"gpu": "1GiB"}, "This machine has no gpu: it has"),
            ({"mps": "1GiB"}, "This machine has no mps: it has"),
            ({1.0: "1GiB"}, "1.0 is no device: use 0, 1, ... for a GPU"),
            ({True: "1GiB"}, "True is no device: use 0, 1, ... for a GPU"),
            ({0: 1, "cuda:0": 2}, "max_memory names cuda:0 twice"),
            ({}, "max_memory must give at least one device a size"),
            ("20GiB", "max_memory must give at least one device a size"),
        ],
    )
    def test_bad_input_is_one_sentence(self, max_memory: object, sentence: str) -> None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
            machine().parse_max_memory(max_memory)
        text = str(caught.value)
        assert text.startswith(sentence)
        assert text.endswith(".")
        assert ". " not in text.replace("... ", "")


class TestPresets:
    def test_names(self) -> None:
        assert Machine.presets() == (
            "Colab T4",
            "Kaggle 2x T4",
            "L4",
            "RTX 3060 12 GB",
            "RTX 3090",
            "RTX 4090",
            "2x RTX 4090",
            "A100 40 GB",
            "A100 80 GB",
            "H100 80 GB",
            "8x A100 80 GB",
            "16 GB laptop",
            "Binder (2 GB)",
        )

    @pytest.mark.parametrize("name", Machine.presets())
    def test_every_preset_is_whole(self, name: str) -> None:
        preset = Machine.preset(name)
        assert preset.name == name
        assert preset == Machine.preset(name)
        ids = [d.id for d in preset.devices]
        assert ids == [*range(len(preset.accelerators)), "cpu", "disk"]
        for each in preset.devices:
            assert each.free_bytes == each.total_bytes  # hypothetical: nothing is in use
            assert 0 < each.reserved_bytes < each.free_bytes / 2
            assert each.bandwidth_bytes_per_s
            assert each.name
            assert each.reserved_for
            # A figure is either somebody's specification or said to be typical.
            assert any(word in each.source for word in ("typical", "data sheet", "specified", "documentation"))
        assert preset.parse_max_memory(None) == preset.budgets()

    @pytest.mark.parametrize(
        ("name", "count", "marketed_gb"),
        [
            ("Colab T4", 1, 16),
            ("Kaggle 2x T4", 2, 16),
            ("L4", 1, 24),
            ("RTX 3060 12 GB", 1, 12),
            ("RTX 3090", 1, 24),
            ("RTX 4090", 1, 24),
            ("2x RTX 4090", 2, 24),
            ("A100 40 GB", 1, 40),
            ("A100 80 GB", 1, 80),
            ("H100 80 GB", 1, 80),
            ("8x A100 80 GB", 8, 80),
            ("16 GB laptop", 0, 0),
            ("Binder (2 GB)", 0, 0),
        ],
    )
    def test_gpus_have_somewhat_less_than_is_printed_on_the_box(self, name: str, count: int, marketed_gb: int) -> None:
        gpus = Machine.preset(name).accelerators
        assert len(gpus) == count
        for gpu in gpus:
            # The driver keeps some, and ECC a sixteenth where it is on (T4, L4).
            assert 0.9 * marketed_gb * GIB < gpu.total_bytes < marketed_gb * GIB

    def test_a_t4_by_hand(self) -> None:
        gpu = Machine.preset("Colab T4").device(0)
        # 14913 MiB; reserved are 500 MiB for CUDA's context and 2 % (298.26 MiB) for the allocator.
        assert gpu.total_bytes == 14_913 * MIB
        assert gpu.reserved_bytes == 500 * MIB + 14_913 * MIB // 50
        assert format_bytes(gpu.budget_bytes) == "13.8 GiB"

    def test_binder_by_hand(self) -> None:
        ram = Machine.preset("Binder (2 GB)").device("cpu")
        # 2 GiB, less 0.5 in use, less the least headroom, 0.2.
        assert ram.budget_bytes == 2 * GIB - GIB // 2 - GIB // 5
        assert format_bytes(ram.budget_bytes) == "1.3 GiB"

    def test_unknown_preset_names_the_closest_and_lists_all(self) -> None:
        with pytest.raises(ValueError, match="no machine preset 'rtx 4091'") as caught:
            Machine.preset("rtx 4091")
        assert "did you mean 'RTX 4090'?" in str(caught.value)
        assert all(name in str(caught.value) for name in Machine.presets())

    def test_bandwidth_of_a_known_card_by_name_else_by_clock_and_bus(self) -> None:
        class Properties:
            name = "Tesla T4"

        assert _cuda_bandwidth(Properties()) == 320 * 10**9
        Properties.name = "NVIDIA T4000"
        assert _cuda_bandwidth(Properties()) is None
        # A T4's own figures: 2 x 5.001 GHz x 256 bits / 8 = 320.064 GB/s.
        Properties.memory_clock_rate, Properties.memory_bus_width = 5_001_000, 256
        assert _cuda_bandwidth(Properties()) == 320_064_000_000


class TestCgroups:
    """Whole trees of the kernel's files, laid out in a folder as the kernel lays them out."""

    V2 = "30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    V1 = "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    NOISE = "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    NO_LIMIT = "9223372036854771712"  # how v1 says it

    @staticmethod
    def write(root: Path, files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return root

    @classmethod
    def v2(cls, root: Path, group: str, groups: dict[str, tuple[object, int, int]], mounted: str = "/") -> Path:
        """`groups`: folder under the mount -> (memory.max, memory.current, file pages)."""
        files = {
            "proc/self/cgroup": f"0::{group}\n",
            "proc/self/mountinfo": cls.NOISE + cls.V2.format(mounted=mounted),
        }
        for folder, (limit, used, cache) in groups.items():
            files[f"sys/fs/cgroup/{folder}/memory.max"] = f"{limit}\n"
            files[f"sys/fs/cgroup/{folder}/memory.current"] = f"{used}\n"
            # A third of the file pages are active; anonymous and shared pages are no cache.
            files[f"sys/fs/cgroup/{folder}/memory.stat"] = (
                f"anon 77\nfile 99\nshmem 22\ninactive_anon 5\nactive_anon 6\n"
                f"inactive_file {cache - cache // 3}\nactive_file {cache // 3}\n"
            )
        return cls.write(root, files)

    @classmethod
    def v1(cls, root: Path, group: str, groups: dict[str, tuple[object, int, int, object]], mounted: str = "/") -> Path:
        """`groups`: as in v2, and the hierarchy's limit."""
        files = {
            "proc/self/cgroup": f"9:name=systemd:/\n4:cpu,memory:{group}\n3:cpuset:/elsewhere\n",
            "proc/self/mountinfo": cls.NOISE + cls.V1.format(mounted=mounted),
        }
        for folder, (limit, used, cache, hierarchy) in groups.items():
            files[f"sys/fs/cgroup/memory/{folder}/memory.limit_in_bytes"] = f"{limit}\n"
            files[f"sys/fs/cgroup/memory/{folder}/memory.usage_in_bytes"] = f"{used}\n"
            files[f"sys/fs/cgroup/memory/{folder}/memory.stat"] = (
                f"cache 12\ninactive_file 1\nactive_file 2\nhierarchical_memory_limit {hierarchy}\n"
                f"total_inactive_file {cache}\ntotal_active_file 0\n"
            )
        return cls.write(root, files)

    def test_no_such_files(self, tmp_path: Path) -> None:
        assert _cgroup_memory(tmp_path) is None

    def test_v2_container(self, tmp_path: Path) -> None:
        # 2 GiB, 900 MiB of them in use, of which 300 MiB are file pages: 2048 - 600 = 1448 MiB free.
        self.v2(tmp_path, "/", {".": (2 * GIB, 900 * MIB, 300 * MIB)})
        assert _cgroup_memory(tmp_path) == (2 * GIB, 1448 * MIB)

    def test_v2_without_a_limit(self, tmp_path: Path) -> None:
        self.v2(tmp_path, "/a", {"a": ("max", 900 * MIB, 0)})
        assert _cgroup_memory(tmp_path) is None

    def test_v2_nested_the_smallest_limit_on_the_way_up(self, tmp_path: Path) -> None:
        groups = {
            "user": (4 * GIB, 1 * GIB, 0),
            "user/session": ("max", 5, 0),
            "user/session/app": (6 * GIB, GIB // 2, 0),
        }
        self.v2(tmp_path, "/user/session/app", groups)
        assert _cgroup_memory(tmp_path) == (4 * GIB, 3 * GIB)

    def test_v2_nested_the_fuller_group_decides_what_is_free(self, tmp_path: Path) -> None:
        # The group itself has the smaller limit, 3 of 4 GiB free; its neighbours left only 1 GiB of the outer 8.
        self.v2(tmp_path, "/pod/me", {"pod": (8 * GIB, 7 * GIB, 0), "pod/me": (4 * GIB, GIB, 0)})
        assert _cgroup_memory(tmp_path) == (4 * GIB, GIB)

    def test_v2_other_groups_do_not_count(self, tmp_path: Path) -> None:
        self.v2(tmp_path, "/pod/me", {"pod/me": (4 * GIB, GIB, 0), "pod/other": (GIB, GIB, 0)})
        assert _cgroup_memory(tmp_path) == (4 * GIB, 3 * GIB)

    @pytest.mark.parametrize(
        ("group", "mounted"), [("/docker/abc", "/docker/abc"), ("/docker/abc", "/else"), ("/../x", "/")]
    )
    def test_v2_container_whose_group_has_the_hosts_name(self, tmp_path: Path, group: str, mounted: str) -> None:
        self.v2(tmp_path, group, {".": (2 * GIB, GIB, 0)}, mounted=mounted)
        assert _cgroup_memory(tmp_path) == (2 * GIB, GIB)

    def test_over_its_limit_nothing_is_free(self, tmp_path: Path) -> None:
        self.v2(tmp_path, "/", {".": (GIB, GIB + 1, 0)})
        assert _cgroup_memory(tmp_path) == (GIB, 0)

    def test_v1(self, tmp_path: Path) -> None:
        self.v1(tmp_path, "/docker/abc", {"docker/abc": (2 * GIB, 900 * MIB, 300 * MIB, 2 * GIB)})
        assert _cgroup_memory(tmp_path) == (2 * GIB, 1448 * MIB)

    def test_v1_nested(self, tmp_path: Path) -> None:
        groups = {"a": (3 * GIB, 2 * GIB, 0, 3 * GIB), "a/b": (self.NO_LIMIT, GIB, 0, self.NO_LIMIT)}
        self.v1(tmp_path, "/a/b", groups)
        assert _cgroup_memory(tmp_path) == (3 * GIB, GIB)

    def test_v1_limit_of_an_ancestor_that_the_container_cannot_see(self, tmp_path: Path) -> None:
        self.v1(tmp_path, "/docker/abc", {".": (self.NO_LIMIT, GIB, 0, 3 * GIB)}, mounted="/docker/abc")
        assert _cgroup_memory(tmp_path) == (3 * GIB, 2 * GIB)

    def test_v1_beside_an_empty_v2(self, tmp_path: Path) -> None:
        self.v1(tmp_path, "/a", {"a": (2 * GIB, GIB, 0, 2 * GIB)})
        both = "31 23 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        for name, text in (("cgroup", "0::/\n"), ("mountinfo", both)):
            with (tmp_path / "proc/self" / name).open("a", encoding="utf-8") as file:
                file.write(text)
        assert _cgroup_memory(tmp_path) == (2 * GIB, GIB)

    def test_ram_is_what_the_limit_leaves(self, tmp_path: Path) -> None:
        # Small enough for any machine that runs this: 64 MiB, 16 of them in use.
        ram = _detect_ram(self.v2(tmp_path, "/", {".": (64 * MIB, 16 * MIB, 0)}))
        assert (ram.total_bytes, ram.free_bytes) == (64 * MIB, 48 * MIB)
        assert "cgroup" in ram.source

    def test_a_limit_past_the_machines_memory_changes_nothing(self, tmp_path: Path) -> None:
        ram = _detect_ram(self.v1(tmp_path, "/", {".": (self.NO_LIMIT, 0, 0, self.NO_LIMIT)}))
        assert ram.total_bytes == psutil.virtual_memory().total
        assert ram.source == "measured by psutil"

    @pytest.mark.parametrize(
        ("total_bytes", "headroom_bytes"),
        [
            (GIB, GIB // 5),  # a tenth would be 0.1 GiB: the least is 0.2
            (5 * GIB, GIB // 2),
        ],
    )
    def test_headroom_is_a_tenth(self, tmp_path: Path, total_bytes: int, headroom_bytes: int) -> None:
        if psutil.virtual_memory().total <= total_bytes:
            pytest.skip(f"needs a machine with more RAM than {format_bytes(total_bytes)}")
        ram = _detect_ram(self.v2(tmp_path, "/", {".": (total_bytes, 0, 0)}))
        assert ram.reserved_bytes == headroom_bytes

    def test_headroom_is_two_gib_at_most(self) -> None:
        # 234 GiB less 1 in use less 2, not 23.4.
        assert Machine.preset("H100 80 GB").device("cpu").budget_bytes == 231 * GIB


class TestDetect:
    def test_agrees_with_psutil_the_cgroup_and_the_disk(self, tmp_path: Path) -> None:
        detected = Machine.detect(offload_folder=tmp_path, accelerators=False)
        assert detected.name == "This machine"
        assert [d.id for d in detected.devices] == ["cpu", "disk"]
        ram, disk = detected.devices

        limit_bytes, limit_free_bytes = _cgroup_memory(Path("/")) or (2**63, 2**63)
        assert ram.total_bytes == min(psutil.virtual_memory().total, limit_bytes)
        # Other processes come and go meanwhile.
        assert abs(ram.free_bytes - min(psutil.virtual_memory().available, limit_free_bytes)) < GIB
        assert 0.2 * GIB - 1 < ram.reserved_bytes <= 2 * GIB
        assert disk.total_bytes == shutil.disk_usage(tmp_path).total
        assert abs(disk.free_bytes - shutil.disk_usage(tmp_path).free) < GIB

    def test_the_offload_folder_need_not_exist(self, tmp_path: Path) -> None:
        folder = tmp_path / "not" / "yet"
        disk = Machine.detect(offload_folder=str(folder), accelerators=False).device("disk")
        assert disk.total_bytes == shutil.disk_usage(tmp_path).total
        assert not (tmp_path / "not").exists()

    def test_an_offload_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=r"offload_folder needs a folder, but .*file' is a file: name another one"):
            Machine.detect(offload_folder=tmp_path / "file" / "x", accelerators=False)

    def test_accelerators_are_torchs(self) -> None:
        import torch

        detected = Machine.detect()
        expected = ["mps"] if torch.backends.mps.is_available() else list(range(torch.cuda.device_count()))
        assert [d.id for d in detected.accelerators] == expected

    @pytest.mark.parametrize("accelerators", [True, False])
    def test_without_torch_there_are_cpu_and_disk(self, accelerators: bool) -> None:  # noqa: FBT001 - pytest's way
        code = (
            "import sys; sys.modules['torch'] = None\n"  # Python's own way to make an import fail
            "from workbench.hardware import Machine\n"
            f"print([d.id for d in Machine.detect(accelerators={accelerators}).devices])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.stdout.strip(), done.stderr) == ("['cpu', 'disk']", "")

    def test_the_first_paint_imports_no_torch(self) -> None:
        code = (
            "import sys; from workbench.hardware import Machine\n"
            "Machine.detect(accelerators=False); Machine.preset('Colab T4')\n"
            "print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.stdout.strip(), done.stderr) == ("False", "")

    @pytest.mark.gpu
    def test_gpu_agrees_with_torch(self) -> None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        gpu = Machine.detect().device(0)
        free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        assert gpu.name == torch.cuda.get_device_name(0)
        assert gpu.total_bytes == total_bytes
        assert abs(gpu.free_bytes - free_bytes) < GIB
        assert 256 * MIB <= gpu.reserved_bytes <= GIB + 200 * MIB
