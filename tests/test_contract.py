"""The kernel-config contract: what it accepts, what it refuses, and what it says."""

from pathlib import Path

import pytest

from pipeline import contract

HEADER = "#\n# Automatically generated file; DO NOT EDIT.\n# Linux/x86 6.12.107 Kernel Configuration\n#\n"
RT_REQUIRED = '[[required]]\nsymbol = "PREEMPT_RT"\nscope = "both"\nwhy = "bounded latency"\n'
LOCKDEP_FORBIDDEN = '[[forbidden]]\nsymbol = "PROVE_LOCKING"\nscope = "both"\nwhy = "slow locks"\n'
REPOSITORY = Path(__file__).resolve().parent.parent


class Bench:
    """A directory with a .config, fragments and a contract, judged through the command line."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.capsys = capsys
        self.config("CONFIG_PREEMPT_RT=y\n")
        self.contract(RT_REQUIRED)
        self.fragment("a", "CONFIG_PREEMPT_RT=y\n")

    def config(self, text: str, header: str = HEADER) -> None:
        (self.directory / ".config").write_text(header + text, encoding="utf-8")

    def contract(self, text: str) -> None:
        (self.directory / "contract.toml").write_text(text, encoding="utf-8")

    def fragment(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text, encoding="utf-8")

    def judge(
        self, *fragments: str, role: str = "host", arch: str = "x86_64", more: list[str] | None = None
    ) -> int:
        at = self.directory
        files = [str(at / name) for name in fragments or ("a",)]
        judged = ["--config", str(at / ".config"), "--contract", str(at / "contract.toml")]
        return contract.main([*judged, "--role", role, "--arch", arch, *(more or []), *files])

    def said(self) -> str:
        return self.capsys.readouterr().err


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    return Bench(tmp_path, capsys)


def test_a_kept_contract_is_silent(bench: Bench) -> None:
    assert bench.judge() == 0
    assert bench.said() == ""


def test_a_requested_symbol_that_did_not_take_is_named_with_its_line(bench: Bench) -> None:
    bench.fragment("a", "# why\n\nCONFIG_PREEMPT_RT=y\nCONFIG_VFIO=y\n")
    assert bench.judge() == 1
    said = bench.said()
    assert "CONFIG_VFIO: wanted y, got n" in said
    assert f"{bench.directory / 'a'}:4: this fragment asks for it" in said
    assert "PREEMPT_RT" not in said


def test_yes_wanted_is_not_module_got(bench: Bench) -> None:
    bench.config("CONFIG_PREEMPT_RT=y\nCONFIG_IGB=m\n")
    bench.fragment("a", "CONFIG_IGB=y\n")
    assert bench.judge() == 1
    assert "CONFIG_IGB: wanted y, got m" in bench.said()


@pytest.mark.parametrize("line", ["# CONFIG_IGB is not set", "CONFIG_IGB=n"])
def test_asking_for_a_symbol_to_be_off(bench: Bench, line: str) -> None:
    bench.fragment("a", line + "\n")
    assert bench.judge() == 0
    bench.config("CONFIG_PREEMPT_RT=y\n# CONFIG_IGB is not set\n")
    assert bench.judge() == 0
    bench.config("CONFIG_PREEMPT_RT=y\nCONFIG_IGB=m\n")
    assert bench.judge() == 1
    assert "CONFIG_IGB: wanted n, got m" in bench.said()


@pytest.mark.parametrize(
    ("wanted", "got", "status"),
    [
        ('"-rt-virt"', '"-rt-virt"', 0),
        ('"-rt-virt"', '""', 1),
        ('"with \\"quotes\\""', '"with \\"quotes\\""', 0),
        ("16", "16", 0),
        ("16", "64", 1),
        ("0x1f", "0x1f", 0),
    ],
)
def test_texts_and_numbers_are_compared_exactly(bench: Bench, wanted: str, got: str, status: int) -> None:
    bench.config(f"CONFIG_PREEMPT_RT=y\nCONFIG_VALUE={got}\n")
    bench.fragment("a", f"CONFIG_VALUE={wanted}\n")
    assert bench.judge() == status


def test_the_last_fragment_wins(bench: Bench) -> None:
    bench.config("CONFIG_PREEMPT_RT=y\nCONFIG_NR_CPUS=16\n")
    bench.fragment("a", "CONFIG_NR_CPUS=64\n")
    bench.fragment("b", "CONFIG_NR_CPUS=16\n")
    assert bench.judge("a", "b") == 0
    assert bench.judge("b", "a") == 1
    assert f"{bench.directory / 'a'}:1" in bench.said()


def test_a_broken_requirement_says_why(bench: Bench) -> None:
    bench.config("# CONFIG_PREEMPT_RT is not set\nCONFIG_SMP=y\n")
    bench.fragment("a", "CONFIG_SMP=y\n")
    assert bench.judge() == 1
    said = bench.said()
    assert "CONFIG_PREEMPT_RT: wanted y, got n" in said
    assert "bounded latency" in said


def test_a_forbidden_symbol_is_refused(bench: Bench) -> None:
    bench.contract(RT_REQUIRED + LOCKDEP_FORBIDDEN)
    assert bench.judge() == 0
    bench.config("CONFIG_PREEMPT_RT=y\nCONFIG_PROVE_LOCKING=y\n")
    assert bench.judge() == 1
    assert "CONFIG_PROVE_LOCKING: wanted n, got y" in bench.said()


def test_a_list_allows_any_of_its_values(bench: Bench) -> None:
    bench.contract(
        '[[required]]\nsymbol = "VFIO"\nvalue = ["y", "m"]\nscope = "host"\nwhy = "pass-through"\n'
    )
    for value in ("y", "m"):
        bench.config(f"CONFIG_PREEMPT_RT=y\nCONFIG_VFIO={value}\n")
        assert bench.judge() == 0
    bench.config("CONFIG_PREEMPT_RT=y\n")
    assert bench.judge() == 1
    assert "CONFIG_VFIO: wanted y or m, got n" in bench.said()


@pytest.mark.parametrize(
    ("scope", "broken"), [("host", {"host"}), ("guest", {"guest"}), ("both", {"host", "guest"})]
)
def test_scope_chooses_the_role(bench: Bench, scope: str, broken: set[str]) -> None:
    bench.contract(RT_REQUIRED + f'[[required]]\nsymbol = "X"\nscope = "{scope}"\nwhy = "w"\n')
    assert {role for role in contract.ROLES if bench.judge(role=role) == 1} == broken


@pytest.mark.parametrize(
    ("bounds", "applies"),
    [
        ("", True),
        ('since = "6.12"', True),
        ('since = "6.12.107"', True),
        ('since = "6.12.108"', False),
        ('before = "6.12.107"', False),
        ('before = "7.0"', True),
        ('since = "6.6"\nbefore = "6.12"', False),
        ('arch = ["x86_64"]', True),
        ('arch = ["arm64"]', False),
    ],
)
def test_version_and_architecture_bound_a_rule(bench: Bench, bounds: str, applies: bool) -> None:
    bench.contract(RT_REQUIRED + f'[[required]]\nsymbol = "X"\nscope = "both"\nwhy = "w"\n{bounds}\n')
    assert bench.judge() == int(applies)


@pytest.mark.parametrize("named", ["x86", "x86_64"])
def test_both_names_of_an_architecture_are_known(bench: Bench, named: str) -> None:
    bench.config("CONFIG_PREEMPT_RT=y\n", header=f"# Linux/{named} 6.12.107 Kernel Configuration\n")
    assert bench.judge() == 0


def test_a_configuration_of_another_architecture_is_refused(bench: Bench) -> None:
    assert bench.judge(arch="arm64") == 2
    assert "Linux/x86, not for arm64" in bench.said()


def test_a_missing_config_is_an_error(bench: Bench) -> None:
    (bench.directory / ".config").unlink()
    assert bench.judge() == 2
    assert "No such file" in bench.said()


def test_an_empty_config_is_an_error(bench: Bench) -> None:
    bench.config("", header="")
    assert bench.judge() == 2
    assert "Kernel Configuration" in bench.said()


def test_a_fragment_is_no_config(bench: Bench) -> None:
    bench.config("CONFIG_PREEMPT_RT=y\n", header="")
    assert bench.judge() == 2


@pytest.mark.parametrize("text", ["", "# only a comment\n"])
def test_a_fragment_that_asks_for_nothing_is_an_error(bench: Bench, text: str) -> None:
    bench.fragment("a", text)
    assert bench.judge() == 2
    assert "asks for nothing" in bench.said()


def test_no_fragments_are_an_error(bench: Bench) -> None:
    with pytest.raises(contract.ContractInputError, match="no configuration fragments"):
        contract.merge_requests([])


@pytest.mark.parametrize(
    "line",
    ["CONFIG_X = y", "CONFIG_X=yes", "X=y", "CONFIG_X=y # why", "CONFIG_X", "  CONFIG_X=y", 'CONFIG_X="a'],
)
def test_a_line_that_kconfig_would_skip_is_an_error(bench: Bench, line: str) -> None:
    bench.fragment("a", f"CONFIG_PREEMPT_RT=y\n{line}\n")
    assert bench.judge() == 2
    assert f"{bench.directory / 'a'}:2" in bench.said()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty contract"),
        ("required = []", "an empty contract"),
        ("required = 3", "no list of entries"),
        ("required = [3]", "not a table"),
        ("[[required", "mend the TOML"),
        ("[[wanted]]", "unknown table 'wanted'"),
        (RT_REQUIRED.replace("both", "pocket"), "unknown scope 'pocket'"),
        (RT_REQUIRED.replace('scope = "both"\n', ""), "no scope"),
        (RT_REQUIRED.replace("bounded latency", " "), "no why"),
        (RT_REQUIRED.replace('"PREEMPT_RT"', '"CONFIG_PREEMPT_RT"'), "without CONFIG_"),
        (RT_REQUIRED + "priority = 1\n", "unknown key 'priority'"),
        (LOCKDEP_FORBIDDEN + 'value = "y"\n', "unknown key 'value'"),
        (RT_REQUIRED + "value = true\n", "value is True"),
        (RT_REQUIRED + "value = []\n", "value is []"),
        (RT_REQUIRED + 'arch = "x86_64"\n', "arch is 'x86_64'"),
        (RT_REQUIRED + 'since = "v6"\n', "since is 'v6'"),
        (RT_REQUIRED.replace("both", "guest"), "no entry for host kernels 6.12.107 of x86_64"),
    ],
)
def test_a_contract_that_cannot_be_judged_is_an_error(bench: Bench, text: str, message: str) -> None:
    bench.contract(text)
    assert bench.judge() == 2
    assert message in bench.said()


def test_a_rule_for_a_symbol_that_the_kernel_does_not_define_is_an_error(bench: Bench) -> None:
    tree = bench.directory / "tree"
    (tree / "kernel").mkdir(parents=True)
    (tree / "kernel" / "Kconfig.preempt").write_text('config PREEMPT_RT\n\tbool "RT"\n', encoding="utf-8")
    assert bench.judge(more=["--source", str(tree)]) == 0
    bench.contract(RT_REQUIRED + LOCKDEP_FORBIDDEN.replace("PROVE_LOCKING", "PROVE_LOKCING"))
    assert bench.judge(more=["--source", str(tree)]) == 2
    assert "no symbol PROVE_LOKCING" in bench.said()


def test_the_questions_for_kconfig_and_its_answers(bench: Bench) -> None:
    assert bench.judge(more=["--list-broken"]) == 0
    assert bench.capsys.readouterr().out == ""
    bench.fragment("a", "CONFIG_PREEMPT_RT=y\nCONFIG_VFIO=y\n")
    assert bench.judge(more=["--list-broken"]) == 0
    assert bench.capsys.readouterr().out == "VFIO=y\n"
    why = bench.directory / "why"
    why.write_text("VFIO\tdepends on IOMMU_API [=n]\n", encoding="utf-8")
    assert bench.judge(more=["--why", str(why)]) == 1
    assert "kconfig: depends on IOMMU_API [=n]" in bench.said()


@pytest.mark.parametrize("role", contract.ROLES)
def test_our_own_contract_and_fragments_can_be_read(role: contract.Role) -> None:
    configs = REPOSITORY / "kernel-configs"
    text = (configs / "common" / "contract.toml").read_text(encoding="utf-8")
    assert contract.select_rules(contract.parse_contract(text, "contract.toml"), role, "x86_64", (6, 12))
    for path in sorted(configs.rglob("*config")):
        assert contract.parse_fragment(path.read_text(encoding="utf-8"), str(path))
