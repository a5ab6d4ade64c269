"""Chains of harmonic molecules: heat capacity, errors, the map from n to T, and what is missing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from kernels.units import EV_TO_KCAL, KCAL_TO_EV
from orchestrator.boltzmann import (
    Swaps,
    Trips,
    analyse,
    exchange_of,
    levels,
    matched,
    rmsd,
)
from orchestrator.boltzmann_tables import (
    check_line,
    map_line,
    settled_line,
    tables,
    values,
)
from orchestrator.errors import StoreError
from orchestrator.ladders import BOLTZMANN, DIFFUSION, EXCHANGE, GUIDED, METROPOLIS
from orchestrator.published import MATCHED, MU
from orchestrator.store import Store
from tests.orchestrator.chain_stores import MU as TRUE_MU
from tests.orchestrator.chain_stores import Chains, published_study
from tests.orchestrator.store_fixtures import little_records, new_store
from tests.orchestrator.test_speedup import basin

HOT = (20, 70, 120, 300)
STEPS = (4, 14, 20, 30)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return published_study(6, steps=3000).store(tmp_path_factory.mktemp("chains") / "store")


def one_molecule(**changes: object) -> tuple[Chains, bytes]:
    made = Chains(**changes)  # type: ignore[arg-type]
    return made, made.molecule("ethanol")


# --- temperatures -----------------------------------------------------------------------------


def test_harmonic_molecules_have_the_harmonic_energy_and_heat_capacity(study: Store) -> None:
    found = analyse(study)
    assert found.thermal is not None
    rows = levels(found, found.thermal)
    assert [row.value for row in rows] == [10, 20, 70, 120, 300]
    for row in rows:
        assert row.molecules == row.chains == 6
        assert row.ratio.value == pytest.approx(1.0, abs=0.03)
        assert row.ratio.low < row.ratio.value < row.ratio.high
        assert row.capacity.value == pytest.approx(1.0, abs=0.12)
        # Each coordinate remembers 0.9 of itself: the energy forgets with the square.
        assert row.time == pytest.approx((1 + 0.81) / (1 - 0.81), rel=0.25)
        assert row.worst < 4.0
        assert row.acceptance == pytest.approx(0.3)
    for subject, ladder in found.of(found.thermal):
        assert ladder.fit is not None
        assert ladder.fit.r_squared > 0.99
        off = ladder.fit.slope / subject.harmonic - 1.0
        assert abs(off) < 4 * ladder.fit.slope_error / subject.harmonic
        assert subject.harmonic == 0.5 * (3 * subject.n_atoms - 6) * BOLTZMANN
    assert "(3N-6)/2 kB T in 12 of 12 cases" in check_line(found)
    assert settled_line(found, found.thermal) == ""


def test_a_chain_that_is_too_hot_is_told(tmp_path: Path) -> None:
    made, parent = one_molecule()
    made.chain(parent, temperature=20)
    made.chain(parent, temperature=40, factor=1.2)
    found = analyse(made.store(tmp_path / "store"))
    assert found.thermal is not None
    cold, hot = levels(found, found.thermal)
    assert (cold.within, hot.within) == (1.0, 0.0)
    assert hot.ratio.value == pytest.approx(1.2, abs=0.04)
    assert "in 1 of 2 cases, +" in check_line(found)


def test_a_start_above_the_minimum_does_not_hide_it(tmp_path: Path) -> None:
    made, parent = one_molecule()
    # The relaxation stopped 0.05 eV too high: the coldest chain comes down from there.
    row = made.row("chains", made.chain(parent, temperature=10))
    row["energy_eV"] = np.concatenate([[-99.95], row["energy_eV"][1:]])
    found = analyse(made.store(tmp_path / "store"))
    (subject,) = found.subjects
    lowest = float(np.min(row["energy_eV"][made.burn_in + 1 :]))
    assert list(subject.ground_eV.values()) == [lowest]


def test_repeats_are_pooled_and_compared(tmp_path: Path) -> None:
    made, parent = one_molecule()
    for repeat in range(3):
        made.chain(parent, temperature=50, repeat=repeat)
        made.chain(parent, temperature=100, repeat=repeat, factor=1.0 + 0.5 * (repeat == 2))
    found = analyse(made.store(tmp_path / "store"))
    assert [name.stage for name in found.ladders] == [METROPOLIS]
    good, bad = found.subjects[0].ladders[found.ladders[0]].rungs
    assert (len(good.chains), good.found.samples) == (3, 3 * 3600)
    assert good.r_hat < 1.02
    assert bad.r_hat > 1.1
    assert bad.found.effective < 0.1 * good.found.effective
    assert settled_line(found, found.ladders[0]).startswith("metropolis: 1 of 2 cases have not")


def test_a_chain_that_still_climbs_is_told(tmp_path: Path) -> None:
    made, parent = one_molecule(burn_in=0)
    noise = np.random.default_rng(0).normal(size=1001)
    made.chain(parent, kind=DIFFUSION, n=4, save_every=1, energies=0.01 * np.arange(1001) + noise)
    found = analyse(made.store(tmp_path / "store"))
    assert found.diffusion is not None
    (row,) = levels(found, found.diffusion)
    assert row.unsettled == 1
    assert "have not settled" in values(found)["lines"][-1]


def test_what_was_run_again_counts_once(tmp_path: Path) -> None:
    made, parent = one_molecule()
    made.chain(parent, temperature=50, factor=3.0, step_size_A=0.5)
    made.chain(parent, temperature=50, step_size_A=0.01)
    found = analyse(made.store(tmp_path / "store"))
    (ladder,) = found.subjects[0].ladders.values()
    (rung,) = ladder.rungs
    assert [chain.step_size for chain in rung.chains] == [0.01]


def test_effective_samples_per_evaluation_against_plain_metropolis(tmp_path: Path) -> None:
    made = Chains()
    for at in range(6):
        parent = made.molecule(f"m{at}")
        for temperature in (70, 300):
            made.chain(parent, temperature=temperature)
            made.chain(parent, kind=GUIDED, temperature=temperature, memory=0.6, n=8)
            made.chain(parent, kind=EXCHANGE, temperature=temperature)
    found = analyse(made.store(tmp_path / "store"))
    paces = {pace.name.kind: pace for pace in found.paces}
    # The times of energies whose coordinates remember 0.9 and 0.6 of themselves.
    times = (1 + 0.81) / (1 - 0.81) / ((1 + 0.36) / (1 - 0.36))
    assert paces[GUIDED].energy.value == pytest.approx(times, rel=0.15)
    assert paces[GUIDED].energy.known
    assert paces[GUIDED].molecules == 6
    assert paces[EXCHANGE].energy.low < 1.0 < paces[EXCHANGE].energy.high
    assert np.isfinite(paces[EXCHANGE].torsion.value)
    exchange = next(name for name in found.ladders if name.kind == EXCHANGE)
    assert levels(found, exchange)[0].swap_acceptance == pytest.approx(0.6)


# --- the map ----------------------------------------------------------------------------------


def test_swaps_of_neighbours_and_round_trips(tmp_path: Path) -> None:
    study = Chains(steps=400)
    for name, accepted, trips in (("a", (80, 20), 3), ("b", (60, 40), 0)):
        study.exchange(
            study.molecule(name), (20, 70, 300), accepted, round_trips=trips,
            efficiency=0.9 if trips else 0.7,
        )  # fmt: skip
    found = analyse(study.store(tmp_path / "store"))
    (name,) = found.ladders
    swapped = exchange_of(found, name)
    assert swapped is not None
    swaps, trips_made = swapped
    assert swaps == [Swaps(20, 70, 2, 200, 0.7, 0.6), Swaps(70, 300, 2, 200, 0.3, 0.2)]
    assert trips_made == Trips(2, 6, 400, 3, 1, (4, 4), pytest.approx(0.8))
    words = "\n".join(part for part in tables(found) if isinstance(part, str))
    assert "3 round trips from the lowest" in words
    assert "6 walkers in 2 ladders (none in 1), 400 steps each" in words
    assert "4 processes a ladder, 80.0 % of their time in energies" in words
    (ladder,) = values(found)["ladders"]
    assert [row["accepted"] for row in ladder["swaps"]] == [0.7, 0.3]
    assert ladder["trips"]["round_trips"] == 3


def test_one_factor_maps_n_to_temperature(study: Store) -> None:
    found = analyse(study)
    (one,) = found.maps
    assert (one.thermal.kind, one.diffusion.kind) == (METROPOLIS, DIFFUSION)
    assert len(one.kept) == len(one.matches) == 6
    assert one.mu.value == pytest.approx(TRUE_MU, rel=0.03)
    assert one.mu.low < one.mu.value < one.mu.high
    assert one.mu_shared.value == pytest.approx(TRUE_MU, rel=0.05)
    for n, temperature in zip(one.ns, one.temperatures, strict=True):
        assert temperature.value == pytest.approx(TRUE_MU * n**2, rel=0.05, abs=1.5)
    assert one.temperature(10).value == pytest.approx(100 * one.mu.value)
    back = one.step(one.temperature(20).value)
    assert back.value == pytest.approx(20.0)
    assert back.low < 20.0 < back.high
    for match in one.kept:
        assert abs(match.mu - TRUE_MU) < 4.5 * match.mu_error
        assert match.rmsd < 0.01
        # 0.03 eV, and the energy that n = 1 has.
        cold = match.subject.harmonic * TRUE_MU
        assert match.rest == pytest.approx(0.03 * EV_TO_KCAL + cold, rel=0.01)
        ladder = match.subject.ladders[one.diffusion]
        assert ladder.fit is not None
        assert ladder.linear is not None
        assert ladder.fit.r_squared > 0.995 > 0.95 > ladder.linear.r_squared
    assert map_line(one).startswith("diffusion step n of qm9-edm samples at T = 0.3")
    assert "6 molecules; published pairs: 0.33)" in map_line(one)


def test_both_ladders_share_their_lowest_energy(study: Store) -> None:
    (one,) = analyse(study).maps
    for match in one.matches:
        for name in (one.thermal, one.diffusion):
            assert match.subject.ladders[name].rungs[0].samples.min() == 0.0


def test_published_pairs_follow_one_factor() -> None:
    # Those of 70, 120 and 300 K; at 20 K the molecules' zeros are uncertain.
    assert pytest.approx(0.33, abs=0.005) == MU
    assert all(t == pytest.approx(MU * n**2, rel=0.12) for t, n in MATCHED[1:])


def test_molecules_whose_minima_disagree_are_discarded_with_a_reason(tmp_path: Path) -> None:
    made = Chains(steps=1500, burn_in=200)
    made.ladders(made.molecule("good"), HOT, STEPS, rest_eV=0.02)
    # One atom of nine moved: 0.9 Å / sqrt(9), and a little is taken up by laying on.
    made.ladders(made.molecule("moved", "COC"), HOT, STEPS, moved=1.2)
    made.ladders(made.molecule("high", "CCN"), HOT, STEPS, rest_eV=8.0 * KCAL_TO_EV)
    store = made.store(tmp_path / "store")
    (one,) = analyse(store).maps
    reasons = {match.subject.name: match.discarded for match in one.matches}
    assert reasons["good"] == ""
    assert reasons["moved"].startswith("the minima differ by 0.3")
    assert reasons["high"].startswith("the lowest n rests 8.")
    assert [match.subject.name for match in one.kept] == ["good"]
    assert one.mu.value == pytest.approx(one.kept[0].mu)
    assert not one.mu.known
    (loose,) = analyse(store, max_rmsd=1.0, max_rest=20.0).maps
    assert len(loose.kept) == 3
    said = [part for part in tables(analyse(store)) if isinstance(part, str)]
    assert any(part.startswith("discarded: moved: the minima differ") for part in said)
    (none,) = analyse(store, max_rmsd=0.0, max_rest=0.0).maps
    assert "no molecule counts" in map_line(none)
    assert tables(analyse(store, max_rmsd=0.0, max_rest=0.0))


def test_distances_of_geometries_know_no_place_and_no_turn() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(7, 3))
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    assert rmsd(one @ turn + 5.0, one) == pytest.approx(0.0, abs=1e-12)
    # A mirror image is another geometry.
    assert rmsd(one * [-1.0, 1.0, 1.0], one) > 0.1


def test_pairs_to_compare() -> None:
    assert matched(HOT, STEPS) == [(t, float(n)) for t, n in MATCHED]
    assert matched((10, 25, 77, 400), (3, 14, 31)) == [(25, 3), (77, 14), (400, 31)]
    assert matched((1000, 2000), (500, 600, 700)) == [(1000, 500), (2000, 600)]
    alone = matched(HOT, ())
    assert [t for t, _ in alone] == list(HOT)
    assert all(np.isnan(n) for _, n in alone)
    assert [n for _, n in matched((), (1, 2))] == [1, 2]
    assert matched((), ()) == []


# --- what is not there ------------------------------------------------------------------------


def test_energies_of_every_few_frames_only(tmp_path: Path) -> None:
    made, parent = one_molecule()
    for temperature in HOT:
        made.chain(parent, temperature=temperature)
    for n in STEPS:
        made.chain(parent, kind=DIFFUSION, n=n, save_every=2, every=5)
    (one,) = analyse(made.store(tmp_path / "store")).maps
    rung = one.kept[0].subject.ladders[one.diffusion].rungs[0]
    assert rung.chains[0].stride == 10
    assert rung.found.samples == (4000 - 400) // 10
    # In steps of the chain, whatever was computed of it: the energies 20 steps apart are forgotten.
    assert 10.0 <= rung.time < 20.0


def test_a_store_with_one_kind_of_chains(tmp_path: Path) -> None:
    hot, parent = one_molecule(steps=1000, burn_in=100)
    hot.chain(parent, temperature=100)
    found = analyse(hot.store(tmp_path / "hot"))
    assert (found.maps, found.paces, found.diffusion) == ((), (), None)
    assert tables(found)
    json.dumps(values(found), allow_nan=False)
    cold, parent = one_molecule(steps=1000, burn_in=100)
    cold.chain(parent, kind=DIFFUSION, n=20)
    cold.chain(parent, kind=DIFFUSION, n=30, points=False)
    found = analyse(cold.store(tmp_path / "cold"))
    assert (found.maps, found.thermal) == ((), None)
    assert {name.level for name in found.ladders} == {"GFN2-xTB"}
    assert tables(found)
    json.dumps(values(found), allow_nan=False)
    empty = new_store(tmp_path / "empty")
    little_records().seal(empty)
    with pytest.raises(StoreError, match="no chain has finished yet"):
        analyse(empty)


def test_chains_whose_energies_are_not_there_yet_wait_in_the_same_ladder(tmp_path: Path) -> None:
    made = Chains(steps=400, burn_in=40)
    for name in ("one", "two"):
        parent = made.molecule(name)
        for n in (4, 14):
            made.chain(parent, kind="diffusion", n=n, save_every=4, points=(name, n) != ("two", 14))
    found = analyse(made.store(tmp_path / "store"))
    (ladder,) = found.ladders
    assert ladder.level
    assert [(row.chains, row.molecules) for row in levels(found, ladder)] == [(2, 2), (2, 1)]
    assert tables(found)


def test_diverged_chains_are_counted_and_in_no_number(tmp_path: Path) -> None:
    made, parent = one_molecule()
    for temperature in HOT:
        made.chain(parent, temperature=temperature)
    for n in STEPS:
        made.chain(parent, kind=DIFFUSION, n=n, save_every=4)
    made.chain(
        parent, kind=DIFFUSION, n=30, repeat=1, save_every=4, factor=50.0, diverged=1,
        divergence="atoms flew apart",
    )  # fmt: skip
    made.gaussian(parent)
    found = analyse(made.store(tmp_path / "store"))
    (one,) = found.maps
    row = levels(found, one.diffusion)[-1]
    assert (row.chains, row.diverged) == (2, 1)
    assert one.mu.value == pytest.approx(TRUE_MU, rel=0.08)
    (chain,) = found.subjects[0].gaussian
    assert (chain.diverged, chain.n_steps) == (True, 300)
    assert (chain.trace[-1] - chain.trace[0]) == pytest.approx(2.0)


def test_a_compacted_store_says_the_same(tmp_path: Path) -> None:
    made = published_study(2, steps=800)
    loose = values(analyse(made.store(tmp_path / "loose")))
    packed = values(analyse(made.store(tmp_path / "packed", compacted=True)))
    assert {**loose, "store": ""} == {**packed, "store": ""}


# --- what people and programs see -------------------------------------------------------------


def test_the_command_prints_tables_lines_and_a_file(study: Store, tmp_path: Path) -> None:
    done = basin("boltzmann", study.path, "--per-chain", tmp_path / "chains.csv")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 120
    rows = [line.split() for line in lines]
    assert any(row[:2] == ["300", "6"] for row in rows)
    assert lines[-2].startswith("diffusion step n of qm9-edm samples at T = 0.3")
    assert lines[-1].startswith("below 50 K: mean energy within 3 standard errors of")
    with open(tmp_path / "chains.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 60
    cold = next(row for row in found if row["temperature_K"] == "10.0")
    assert float(cold["mean_over_harmonic"]) == pytest.approx(1.0, abs=0.1)
    assert cold["n"] == "0"
    assert float(cold["effective_samples"]) > 100
    assert {row["temperature_K"] for row in found if row["kind"] == DIFFUSION} == {""}


def test_values_are_plain(study: Store) -> None:
    found = json.loads(json.dumps(values(analyse(study)), allow_nan=False))
    (one,) = found["maps"]
    assert one["mu"]["value"] == pytest.approx(TRUE_MU, rel=0.03)
    assert [m["discarded"] for m in one["molecules"]] == [""] * 6
    assert [pair["n"] for pair in one["matched"]] == [4, 14, 20, 30]
    assert found["published"]["matched"][0] == {"temperature_K": 20.0, "n": 4}
    ladder = found["molecules"][0]["ladders"][0]
    assert ladder["heat_capacity_over_harmonic"] == pytest.approx(1.0, abs=0.1)


def test_dihedrals_at_matched_pairs_are_alike(study: Store) -> None:
    (one,) = values(analyse(study))["maps"]
    for pair in one["matched"][1:]:
        assert np.mean(pair["dihedral_overlap"]) > 0.7
