"""Stages of chains in a campaign file: ladders written out, keys, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels.graph import is_flexible, may_be_flexible, parse_smiles
from orchestrator.campaign import load_campaign
from orchestrator.chain_stages import DIFFUSION_STEPS, TEMPERATURES
from orchestrator.errors import CampaignError
from orchestrator.key_index import KeyIndex
from orchestrator.plan import Item, Plan, StagePlan
from orchestrator.stream import MOST_TOGETHER, Estimate, Stream
from tests.orchestrator.run_fixtures import ingested, write_campaign
from tests.orchestrator.tiny_models import write_model

ROOT = Path(__file__).parents[2]
BEFORE = '[[stages]]\nkernel = "embed"\n[[stages]]\nname = "ground"\nkernel = "relax"\n'
METROPOLIS = '[[stages]]\nkernel = "metropolis"\nfrom = "ground"\n'
DIFFUSION = (
    '[[stages]]\nkernel = "diffusion_chain"\nfrom = "ground"\nmodel = "little.safetensors"\n'
)
SMILES = ["CCO", "CCC", "COC"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "little.safetensors")
    return tmp_path


def plan(folder: Path, stages: str) -> Plan:
    return Plan(load_campaign(write_campaign(folder, SMILES, stages=BEFORE + stages)))


def keys(made: Plan) -> dict[str, bytes]:
    """Return the key of each stage's task for some molecule, by the stage's name."""
    found: dict[str, bytes] = {}
    at: list[bytes] = []
    for stage in made.stages:
        at.append(stage.key(b"m" * 16 if stage.parent < 0 else at[stage.parent], 0))
        found[stage.name] = at[-1]
    return found


def refused(folder: Path, stages: str) -> str:
    with pytest.raises(CampaignError) as error:
        plan(folder, stages)
    return str(error.value)


def test_the_default_ladders_are_the_published_ones(folder: Path) -> None:
    made = plan(folder, METROPOLIS + DIFFUSION + '[[stages]]\nkernel = "single_points"\n')
    named = {stage.name: stage for stage in made.stages}
    assert len(TEMPERATURES) == 18
    assert [f"metropolis-{t:g}K" in named for t in TEMPERATURES] == [True] * 18
    assert [f"diffusion_chain-{n}" in named for n in DIFFUSION_STEPS] == [True] * 14
    # Single points take the stage before for their origin, chains included.
    assert [f"single_points-{n}" in named for n in DIFFUSION_STEPS] == [True] * 14
    cold = named["metropolis-10K"].settings
    assert (cold["steps"], cold["burn_in"], cold["temperature"]) == (24_000, 5000, 10.0)
    first = named["diffusion_chain-1"]
    assert (first.settings["steps"], first.settings["burn_in"]) == (20_000, 1000)
    energies = named["single_points-1"]
    assert (energies.frames, energies.along_path, energies.path_table) == (20_001, True, "chains")


def test_the_jobs_that_come_with_basin_are_the_whole_protocol_and_a_small_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BASIN_DATA", "/nowhere")
    whole = Plan(load_campaign(ROOT / "jobs" / "qm9_boltzmann.toml"))
    kernels = Counter(stage.kernel for stage in whole.stages)
    assert kernels == {
        "relax": 1, "metropolis": 18, "gaussian_chain": 1, "diffusion_chain": 14,
        "single_points": 14,
    }  # fmt: skip
    assert whole.from_files
    # What is written there of the defaults is what they are.
    named = {stage.name: stage.settings for stage in whole.stages}
    assert [named[f"metropolis-{t:g}K"]["temperature"] for t in TEMPERATURES] == list(TEMPERATURES)
    assert [named[f"diffusion-{n}"]["n"] for n in DIFFUSION_STEPS] == list(DIFFUSION_STEPS)
    small = load_campaign(ROOT / "jobs" / "boltzmann_small.toml")
    assert {"replica_exchange", "metropolis"} <= {stage.kernel for stage in small.stages}


def test_repeats_are_chains_of_their_own_and_the_first_keeps_its_key(folder: Path) -> None:
    ladder = 'temperatures = ["20 K", 300]\nsteps = 100\n'
    once = keys(plan(folder, METROPOLIS + ladder))
    thrice = keys(plan(folder, METROPOLIS + ladder + "repeats = 3\n"))
    assert list(thrice)[2:] == [
        f"metropolis-{t}K{r}" for t in (20, 300) for r in ("", "-r2", "-r3")
    ]
    assert once.items() <= thrice.items()
    assert len(set(thrice.values())) == len(thrice)


def test_what_starts_from_a_list_of_one_is_named_with_it(folder: Path) -> None:
    energies = '[[stages]]\nname = "e"\nkernel = "single_points"\n'
    made = plan(folder, DIFFUSION + "n = [14]\nrepeats = 2\n" + energies)
    names = [stage.name for stage in made.stages[2:]]
    assert names == ["diffusion_chain-14", "diffusion_chain-14-r2", "e-14", "e-14-r2"]
    assert [made.stages[made.stages[s].parent].name for s in (4, 5)] == names[:2]


def test_temperatures_and_seed_enter_the_key_and_their_writing_does_not(folder: Path) -> None:
    def key(text: str, name: str) -> bytes:
        return keys(plan(folder, text))[name]

    plain = METROPOLIS + "temperatures = 300\n"
    assert key(plain, "metropolis") == key(
        METROPOLIS + 'temperatures = ["300 K"]\nsteps = 24000\nburn_in = 5000\ntune = false\n',
        "metropolis-300K",
    )
    others = ["temperatures = 301\n", "temperatures = 300\nstep_size = 0.01\n"]
    assert all(
        key(METROPOLIS + other, "metropolis") != key(plain, "metropolis") for other in others
    )
    whole = '[[stages]]\nkernel = "replica_exchange"\nfrom = "ground"\ntemperatures = [20, 70]\n'
    assert [s.settings["temperatures"] for s in plan(folder, whole).stages[2:]] == [[20.0, 70.0]]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (METROPOLIS + "temperatures = [20, 0]\n", ["temperatures = 0", "more than 0 K"]),
        (METROPOLIS + "temperatures = [20, 20.0]\n", ["temperatures", "twice"]),
        (METROPOLIS + 'temperatures = ["20 °C"]\n', ["not in kelvin"]),
        (METROPOLIS + "steps = 100\nburn_in = 100\n", ["burn_in = 100", "nothing of steps = 100"]),
        (METROPOLIS + "repeats = 0\n", ["repeats = 0"]),
        (METROPOLIS + "n = 8\n", ["n = 8", 'belongs to proposal = "diffusion"']),
        (
            METROPOLIS + 'proposal = "diffusion"\nmodel = "little.safetensors"\n',
            ["n is missing", "n = 20"],
        ),
        (
            METROPOLIS + 'proposal = "diffusion"\nmodel = "little.safetensors"\nn = 101\n',
            ["has 100 diffusion steps"],
        ),
        (
            METROPOLIS + 'proposal = "diffusion"\nmodel = "qm9-gfn2"\nn = 8\n',
            ["architecture basin", "qm9-edm"],
        ),
        (
            METROPOLIS + '[[stages]]\nkernel = "mmff"\nfrom = "metropolis-10K"\n',
            ["gives chains and no geometry"],
        ),
        (
            '[[stages]]\nkernel = "replica_exchange"\nfrom = "ground"\ntemperatures = 300\n',
            ["temperatures = 300", "nothing to swap with"],
        ),
        (
            '[[stages]]\nkernel = "gaussian_chain"\nfrom = "ground"\nmax_energy = "2 Å"\n',
            ["is a length, and an energy is needed"],
        ),
    ],
)
def test_a_slip_is_told_in_its_own_words(folder: Path, stages: str, words: list[str]) -> None:
    message = refused(folder, stages)
    for word in words:
        assert word in message


def test_flexible_molecules_have_neither_rings_nor_multiple_bonds_nor_many_branches() -> None:
    flexible = ["CCO", "CCCCCCC", "FC(F)C", "[2H]C", "C[N+](C)(C)[O-]"]
    stiff = ["C=C", "CC#N", "C1CC1", "c1ccccc1", "CCCCCCCC", "CC(C)(C)C(C)(C)C", ""]
    assert [is_flexible(smiles) for smiles in flexible] == [True] * 5
    assert [is_flexible(smiles) for smiles in stiff] == [False] * 7
    for smiles in [*flexible, *stiff[:-1], "[CH2]C", "[O-]C[NH3+]"]:
        assert may_be_flexible(parse_smiles(smiles).numbers) >= is_flexible(smiles), smiles
    # The quick look rules out what has a ring or a multiple bond, before either is looked for.
    assert not any(may_be_flexible(parse_smiles(smiles).numbers) for smiles in stiff[:4])


def test_only_flexible_molecules_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    smiles = ["C1CC1", "CCO", "C=C", "CCC", "not a molecule"]
    path = write_campaign(tmp_path, smiles, stages=BEFORE, molecules="flexible = true")
    _, plan_folder = ingested(load_campaign(path))
    stream = _stream(load_campaign(path), plan_folder)
    assert [item.smiles for item in stream.ready[0]] == ["CCO", "CCC"]
    # What cannot be read may be what was asked for: it is counted, as ever.
    assert (stream.entries, stream.bad_entries) == (3, 1)


def _stream(campaign: object, plan_folder: Path) -> Stream:
    made = Plan(campaign)  # type: ignore[arg-type]
    stream = Stream(made, plan_folder, KeyIndex(), [Estimate(s.kernel) for s in made.stages])
    while stream.pull():
        pass
    return stream


@pytest.fixture
def chains(folder: Path) -> Callable[[str], Stream]:
    def make(more: str) -> Stream:
        campaign = load_campaign(write_campaign(folder, SMILES, stages=BEFORE + DIFFUSION + more))
        _, plan_folder = ingested(campaign)
        return _stream(campaign, plan_folder)

    return make


def test_chains_of_all_n_and_molecules_run_together(chains: Callable[[str], Stream]) -> None:
    stream = chains("n = [4, 14]\nrepeats = 2\n")
    made = stream.plan
    assert {stage.name: len(made.siblings(stage)) for stage in made.stages} == {
        "embed": 0,
        "ground": 0,
        **dict.fromkeys([f"diffusion_chain-{n}{r}" for n in (4, 14) for r in ("", "-r2")], 4),
    }
    for _ in SMILES:
        # What the chains wait for goes first, one molecule after the other.
        for stage in (0, 1):
            taken = stream.take("cpu", 1e-9, 2)
            assert taken is not None
            assert taken[0].index == stage
            (item,) = taken[1]
            stream.finished(stage, item, True, "shard")
    taken = stream.take("cpu", 1e-9, 1)
    assert taken is not None
    stage, items = taken
    assert (stage.index, len(items)) == (2, 12)
    assert sorted(item.stage for item in items) == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert stream.take("cpu", 1e-9, 1) is None
    # The results count for the stages that they belong to, whatever the bundle is called.
    for item in items:
        stream.finished(stage.index, item, item.stage != 3, "shard")
    assert stream.ok == [3, 3, 3, 0, 3, 3]
    assert stream.failed == [0, 0, 0, 3, 0, 0]
    again = next(item for item in items if item.stage == 3)
    stream.reopen(stage.index, again)
    assert stream.failed[3] == 2
    assert list(stream.ready[2]) == [again]


def test_chains_wait_for_company_a_while_and_not_for_ever(
    chains: Callable[[str], Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = chains("n = [4, 14]\n")
    under_way = []
    while taken := stream.take("cpu", 1e-9, 1):
        stage, (item,) = taken
        if stage.kernel == "embed" or not under_way:
            under_way += [item] if stage.kernel == "relax" else []
            stream.finished(stage.index, item, True, "")
    # Two relaxations are under way, whose chains could share the calls of the first one's.
    assert [len(queue) for queue in stream.ready] == [0, 0, 2, 0]
    monkeypatch.setattr("orchestrator.stream._HOLD_S", -1.0)
    taken = stream.take("cpu", 1e-9, 1)
    assert taken is not None
    assert len(taken[1]) == 2


def up_to_the_chains(stream: Stream) -> tuple[StagePlan, list[Item]]:
    """Finish whatever comes before the diffusion chains; return their first bundle."""
    while taken := stream.take("cpu", 1e9, 1):
        if taken[0].kernel == "diffusion_chain":
            return taken
        for item in taken[1]:
            stream.finished(taken[0].index, item, True, "")
    raise AssertionError("no diffusion chain came")


def test_workers_share_the_chains_that_are_ready(chains: Callable[[str], Stream]) -> None:
    stream = chains("n = [1, 2, 4, 8]\n")
    stage, items = up_to_the_chains(stream)
    for item in items:
        stream.push(stage.index, item)
    shares = []
    while taken := stream.take("cpu", 1e9, 5):
        shares.append(len(taken[1]))
    assert sum(shares) == 12 < MOST_TOGETHER
    assert shares[0] == 3


def test_chains_that_were_under_way_together_go_on_together(
    chains: Callable[[str], Stream],
) -> None:
    stream = chains("n = [1, 2, 4, 8]\n")
    stage, items = up_to_the_chains(stream)
    # As after a kill: seven had begun together, three in another bundle, and two not at all.
    known = {item.key: "seven" for item in items[::2] + items[1:2]}
    known |= {item.key: "three" for item in items[3:9:2]}
    stream._company = lambda item: known.get(item.key, "")
    for item in items:
        stream.push(stage.index, item)
    shares = []
    while taken := stream.take("cpu", 1e9, 5):
        shares.append({known.get(item.key, "") for item in taken[1]})
        shares[-1].add(str(len(taken[1])))
    assert sorted(map(sorted, shares)) == [["", "1"], ["", "1"], ["3", "three"], ["7", "seven"]]
