"""The `basin` command."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator import counts
from orchestrator.errors import BasinError, CampaignError, StoreError
from orchestrator.model_command import model_app

if TYPE_CHECKING:
    from orchestrator.campaign import Campaign
    from orchestrator.sites import Site
    from orchestrator.store import Store

EXIT_UNFINISHED = 5
_ENDINGS = {
    "": "parquet",
    ".parquet": "parquet",
    ".sdf": "sdf",
    ".xyz": "extxyz",
    ".extxyz": "extxyz",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
}

app = typer.Typer(
    name="basin",
    help="Relaxation and sampling campaigns over potential energy surfaces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help and usage errors: no frames to read around, and quicker to start.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit status: 0 done; 2 campaign, site or usage wrong; 3 store not usable; 4 the run "
        "broke off; 5 stopped before all was done (start again to go on)."
    ),
)

app.add_typer(model_app)

CampaignFile = Annotated[Path, typer.Argument(metavar="CAMPAIGN.toml", help="Campaign file.")]
Place = Annotated[
    Path, typer.Argument(metavar="STORE|CAMPAIGN.toml", help="Store folder, or campaign file.")
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Store folder instead of the campaign file's.")
]
SiteOption = Annotated[
    str,
    typer.Option(
        "--site", envvar="BASIN_SITE", help="Machine: a name, or your own TOML or Python file."
    ),
]
NodeHoursOption = Annotated[
    float | None,
    typer.Option("--max-node-hours", min=0.0, help="Use no more of the clusters' nodes than this."),
]
RetryOption = Annotated[
    bool, typer.Option("--retry-failed", help="Run failed tasks again (bad input excepted).")
]
ReportOption = Annotated[
    bool, typer.Option("--report", help="Write report.html into the store at the end.")
]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Count everything anew, however long that takes.")
]
ForgetOption = Annotated[
    bool, typer.Option("--forget-nodes", help="Take nodes again that were set aside as bad.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Workers on this machine (default: cores).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@dataclass(frozen=True, slots=True)
class _Options:
    """What `basin run` was asked for, to be passed on to a driver elsewhere."""

    site: str
    workers: int | None = None
    retry_failed: bool = False
    report: bool = False
    max_node_hours: float | None = None
    forget_nodes: bool = False

    def words(self, campaign: Campaign) -> list[str]:
        """Return the arguments of `basin run` that mean the same in any folder."""
        path = Path(self.site)
        site = str(path.absolute()) if path.suffix in (".py", ".toml") else self.site
        words = [str(campaign.path.absolute()), "--site", site, "--store", str(campaign.store)]
        if self.workers is not None:
            words.append(f"--workers={self.workers}")
        if self.max_node_hours is not None:
            limit = counts.in_full(self.max_node_hours)
            words.append(f"--max-node-hours={limit}")
        flags = {
            "--retry-failed": self.retry_failed,
            "--report": self.report,
            "--forget-nodes": self.forget_nodes,
        }
        return words + [flag for flag, given in flags.items() if given]


def _campaign(path: Path, store: Path | None = None) -> Campaign:
    from orchestrator.campaign import load_campaign

    campaign = load_campaign(path)
    return campaign.model_copy(update={"store": store.absolute()}) if store else campaign


def _open(place: Path) -> Store:
    from orchestrator.store import open_store

    return open_store(place)


def _campaign_of(place: Path) -> tuple[Campaign, Store]:
    """Return the campaign and its store, from either's path."""
    from orchestrator.store import Store

    if place.suffix == ".toml":
        campaign = _campaign(place)
        return campaign, Store(campaign.store)
    store = Store(place)
    try:
        about = json.loads((store.path / "control" / "campaign_file.json").read_text())
    except (OSError, ValueError) as exc:
        raise StoreError(
            f"{store.path}: does not say which campaign file it was made from; give that file"
        ) from exc
    path = Path(about["path"])
    if not path.exists():
        raise CampaignError(
            f"{path}: the campaign file that made {store.path} is not there any more; give its "
            "present path"
        )
    return _campaign(path, store.path), store


def _print_json(value: object) -> None:
    try:
        text = json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        # JSON has no NaN and no infinity; Python's own way of writing them breaks other readers.
        text = json.dumps(_finite(value), default=str)
    print(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command()
def plan(
    file: CampaignFile,
    store: StoreOption = None,
    site: SiteOption = "local",
    workers: WorkersOption = None,
    max_node_hours: Annotated[
        float | None,
        typer.Option("--max-node-hours", min=0.0, help="Refuse where more would be used."),
    ] = None,
    exact: ExactOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check a campaign and say what would run; nothing is started.

    On a cluster: also what would be submitted, in node-hours and as batch scripts.
    """
    from orchestrator.forecast import forecast
    from orchestrator.sites import load_site, require_plain_path

    campaign = _campaign(file, store)
    require_plain_path(campaign.store)
    loaded = load_site(site, workers=workers)
    found = forecast(campaign, loaded, exact=exact)
    if as_json:
        _print_json(asdict(found))
        _refuse_beyond(max_node_hours, found.node_hours, campaign, loaded)
        return
    from rich.table import Table

    from orchestrator.show import blocks_forecast, core_hours, duration
    from orchestrator.show import console as make_console

    console = make_console()
    about = "about " if found.sampled else ""
    console.print(
        f"{campaign.name}: {found.entries:,} entries, {about}{found.molecules:,} molecules, "
        f"{about}{found.duplicates:,} repeated, {about}{found.bad:,} that cannot be read",
        markup=False,
    )
    if found.sampled:
        m = found.margins
        console.print(
            f"  (entries are counted, the rest is estimated from {found.sampled:,} of them drawn "
            f"at random; 95 %: molecules ± {m['molecules']:,.0f}, "
            f"repeated ± {m['duplicates']:,.0f}, unreadable ± {m['bad']:,.0f}, "
            f"core-hours ± {core_hours(m['core_hours'])}; "
            "--exact reads all)",
            markup=False,
        )
    for line in found.bad_examples:
        console.print(f"  {line}", markup=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("what")
    table.add_column("pool")
    for name in ("tasks", "done", "bundles", "core-hours"):
        table.add_column(name, justify="right")
    for s in found.stages:
        table.add_row(
            s.stage,
            s.what,
            s.pool,
            f"{s.tasks:,}",
            f"{s.done:,}",
            f"{s.bundles:,}",
            core_hours(s.core_hours),
        )
    console.print(table)
    console.print(
        "nothing is left to do"
        if all(s.done == s.tasks for s in found.stages)
        else f"what is left takes {core_hours(found.core_hours)} core-hours, "
        f"{duration(found.wall_s)} on site {found.site!r}\n"
        f"({', '.join(f'pool {p}: {n} workers' for p, n in found.workers.items())}; estimated "
        f"from {found.estimates_from})",
        markup=False,
    )
    if campaign.train is not None:
        console.print(
            f"then {campaign.training_file} is trained on pool {campaign.train.pool}", markup=False
        )
    for warning in found.warnings:
        console.print(f"warning: {warning}", markup=False)
    console.print(f"results go to {campaign.store}", markup=False)
    for pool, script in found.batch_scripts.items():
        console.print(f"\nbatch script for pool {pool}:\n{script.rstrip()}", markup=False)
    if found.batch_scripts and found.pools:
        console.print("\nwhat would be submitted:", markup=False)
        console.print(blocks_forecast(found.pools))
    _refuse_beyond(max_node_hours, found.node_hours, campaign, loaded)


def _refuse_beyond(limit: float | None, node_hours: float, campaign: Campaign, site: Site) -> None:
    """Raise CampaignError where a forecast exceeds what earlier runs left of a budget."""
    if limit is None:
        return
    from orchestrator import fleet, progress

    before = progress.read(campaign.store)
    executors = list(site.config.executors)
    used = fleet.hours_used(before, executors) if before is not None else 0.0
    if node_hours > max(limit - used, 0.0):
        needed = math.ceil(100 * (used + node_hours)) / 100
        budget = counts.in_full(limit)
        raise CampaignError(
            f"--max-node-hours {budget}: what is left takes about {node_hours:,.2f} node-hours, "
            f"and {used:,.2f} of {budget} are used (all runs of a campaign count); allow "
            f"{needed:.2f} or more, or compute less: `limit` of [molecules], cheaper levels"
        )


def _require_budget(campaign: Campaign, options: _Options) -> None:
    """Raise CampaignError before anything is started that the node-hours do not suffice for.

    What cannot be forecast is started: it stops in good order when the hours are used.
    """
    if options.max_node_hours is None:
        return
    from orchestrator.forecast import forecast
    from orchestrator.sites import load_site

    try:
        # A site of its own: for the forecast its providers are made to submit nothing.
        loaded = load_site(options.site, workers=options.workers)
        found = forecast(campaign, loaded)
    except BasinError:
        return  # the run meets the same, if it matters there
    _refuse_beyond(options.max_node_hours, found.node_hours, campaign, loaded)


@app.command()
def run(
    file: CampaignFile,
    store: StoreOption = None,
    site: SiteOption = "local",
    workers: WorkersOption = None,
    retry_failed: RetryOption = False,
    report: ReportOption = False,
    max_node_hours: NodeHoursOption = None,
    forget_nodes: ForgetOption = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Go on without this terminal; return when it runs.")
    ] = False,
    chain: Annotated[
        Path | None,
        typer.Option(metavar="SCRIPT", help="In a batch job: submit this to go on afterwards."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a campaign or go on with it; the same command resumes.

    Ctrl-C finishes the running items and stops; a second Ctrl-C stops at once. Neither loses
    finished work. `basin stop` does the same from anywhere.
    """
    from orchestrator.molecules import find_files
    from orchestrator.sites import load_site

    campaign = _campaign(file, store)
    options = _Options(site, workers, retry_failed, report, max_node_hours, forget_nodes)
    if detach:
        load_site(site, workers=workers).require_pools(campaign.pools)
        find_files(campaign.molecules, campaign.path.parent)
        _require_budget(campaign, options)
        _detach(campaign, options.words(campaign), as_json)
    elif chain is not None:
        from orchestrator.chain import chained
        from orchestrator.store import Store

        place = Store.create(campaign.store, campaign.name).path
        with chained(place, chain, max_node_hours, lambda words: print(words, flush=True)) as first:
            if not first:  # what is to be done once
                options = replace(options, retry_failed=False, forget_nodes=False)
            # No refusal here: what `basin submit` has taken on is not broken off by a forecast.
            _drive(campaign, options, as_json)
    else:
        _require_budget(campaign, options)
        _drive(campaign, options, as_json)


def _detach(campaign: Campaign, words: list[str], as_json: bool) -> None:
    from orchestrator import lock, progress
    from orchestrator.detach import detach
    from orchestrator.store import Store

    store = Store.create(campaign.store, campaign.name).path

    def started() -> bool:
        last = progress.read(store)
        return last is not None and last.run_id == lock.who(store).get("run_id")

    driver = detach(store, words, started)
    if as_json:
        _print_json({"event": "detached", **asdict(driver), "store": str(store)})
    elif driver.status is None:
        print(
            f"{campaign.name} goes on as process {driver.pid}; you may log out\n"
            f"log:   {driver.log}\n"
            f"watch: basin status --watch {store}\n"
            f"stop:  basin stop {store}"
        )
    else:
        print(driver.log.read_text(), end="", file=sys.stderr if driver.status else sys.stdout)
    if driver.status:
        raise typer.Exit(driver.status)


def _drive(campaign: Campaign, options: _Options, as_json: bool) -> None:
    """Drive a campaign in this process; raises typer.Exit where it is not finished."""
    from orchestrator.molecules import find_files
    from orchestrator.run import Driver
    from orchestrator.show import Shower, core_hours, counts_table, duration
    from orchestrator.show import console as make_console
    from orchestrator.sites import load_site

    loaded = load_site(options.site, workers=options.workers)
    find_files(campaign.molecules, campaign.path.parent)  # before a store is made for nothing
    with Shower(as_json=as_json) as shower:
        driver = Driver(
            campaign,
            loaded,
            retry_failed=options.retry_failed,
            show=shower,
            max_node_hours=options.max_node_hours,
            forget_nodes=options.forget_nodes,
        )
        try:
            summary = driver.run()
        except KeyboardInterrupt:
            print(
                "stopped at once; finished work is kept, the same command goes on from there",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None
    problems = driver.store.snapshot().problems
    page = None
    said: list[str] = []
    if options.report:
        from orchestrator.report import findings, write_report
        from orchestrator.report_diffusion import gather
        from orchestrator.speedup import saved_line

        diffusion = gather(driver.store, [stage.name for stage in campaign.stages])
        target = driver.store.path / "report.html"
        page = write_report(driver.store, target, counts=summary.counts, diffusion=diffusion)
        said = findings(driver.store, diffusion)
        if diffusion.comparison:
            said.append(saved_line(diffusion.comparison))
    elif not as_json:
        said = [_saved(driver.store, campaign)]
    if as_json:
        _print_json(
            {
                "event": "end",
                **asdict(summary),
                "problems": problems,
                "store": str(driver.store.path),
                "report": str(page) if page else None,
            }
        )
    else:
        console = make_console()
        console.print(counts_table(summary.counts))
        console.print(
            f"{summary.entries:,} entries read, {summary.bad_entries:,} bad; "
            f"{summary.done_now:,} tasks done now ({summary.done_before:,} before) in "
            f"{duration(summary.elapsed_s)}, {core_hours(summary.core_s / 3600)} core-hours",
            markup=False,
        )
        for note in summary.notes:
            print(f"note: {note}", file=sys.stderr)
        _print_problems(problems)
        for line in filter(None, said):
            console.print(line, markup=False)
        if page is not None:
            console.print(f"report: {page}", markup=False)
        else:
            console.print(f"results: {driver.store.path}", markup=False)
    if not summary.complete:
        if not as_json:
            print("not finished: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(EXIT_UNFINISHED)


def _print_problems(problems: dict[str, str]) -> None:
    for message in problems.values():
        print(f"warning: {message}", file=sys.stderr)


@app.command()
def submit(
    file: CampaignFile,
    store: StoreOption = None,
    site: SiteOption = "local",
    retry_failed: RetryOption = False,
    report: ReportOption = False,
    max_node_hours: NodeHoursOption = None,
    forget_nodes: ForgetOption = False,
    partition: Annotated[
        str | None, typer.Option("--partition", "--queue", help="For the driver's job.")
    ] = None,
    account: Annotated[
        str | None, typer.Option(help="That the driver's job is charged to.")
    ] = None,
    walltime: Annotated[
        str | None, typer.Option(help='Of the driver\'s job, as "12 h"; others follow it.')
    ] = None,
    memory: Annotated[str | None, typer.Option(help='Of the driver\'s job, as "8 GB".')] = None,
    show: Annotated[
        bool, typer.Option("--print", help="Print the batch script; submit nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a campaign with its driver in a batch job, too.

    For clusters that end long processes on login nodes. Where the job ends before the campaign
    does, a follow-up goes on. Settings of the job come from the site file's [driver].
    """
    from orchestrator import submit as batch
    from orchestrator.molecules import find_files
    from orchestrator.sites import load_site, require_plain_path

    campaign = _campaign(file, store)
    require_plain_path(campaign.store)
    find_files(campaign.molecules, campaign.path.parent)
    loaded = load_site(site)
    wanted = {
        "partition": partition, "account": account, "walltime": walltime, "memory": memory,
    }  # fmt: skip
    job = batch.driver_job(loaded, wanted)
    loaded.require_pools(campaign.pools)
    options = _Options(site, None, retry_failed, report, max_node_hours, forget_nodes)
    _require_budget(campaign, options)
    words = options.words(campaign)
    script = batch.render(job, campaign.name, campaign.store, Path.cwd(), words)
    if show:
        print(script, end="")
        return
    from orchestrator.store import Store

    place = Store.create(campaign.store, campaign.name)
    place.require_writable()
    made = batch.submit(place.path, job, script)
    if as_json:
        _print_json({"event": "submitted", "job": made, "store": str(place.path)})
        return
    print(
        f"{campaign.name}: driver job {made} submitted; where it ends first, another follows\n"
        f"script: {place.path / 'control' / batch.SCRIPT}\n"
        f"log:    {place.path / 'logs'}/driver-{made}.log\n"
        f"watch:  basin status --watch {place.path}\n"
        f"stop:   basin stop {place.path}\n"
        f"(after {job.scheduler.programs[2]} {made} the next job would go on)"
    )


@app.command()
def stop(
    place: Place,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the running items.")] = False,
    site: SiteOption = "local",
) -> None:
    """Stop a run from anywhere, and what waits to go on with it.

    Running items finish and long ones save their state, as after Ctrl-C; batch jobs that a
    killed driver left behind are cancelled.
    """
    from orchestrator.stop import stop as end

    end(_open(place).path, now=now, site=site, say=lambda words: print(words, flush=True))


@app.command()
def status(
    place: Place,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until it ends.")] = False,
    exact: ExactOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say how a campaign stands: done, failed, waiting.

    planned = ok + failed + not reached + waiting; not reached are tasks that can never start,
    since an earlier stage failed for their molecule.
    """
    from orchestrator.watch import look, page
    from orchestrator.watch import watch as show_on

    campaign, store = _campaign_of(place)
    if watch and not as_json:
        try:
            show_on(campaign, store)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        return
    found = look(campaign, store, exact=exact)
    if as_json:
        _print_json(found.as_json())
        return
    from orchestrator.show import console as make_console

    make_console().print(page(found))
    _print_problems(found.standing.problems)


@app.command()
def explain(
    what: Annotated[str, typer.Argument(metavar="KEY|SMILES", help="Task, molecule or SMILES.")],
    place: Place,
    as_json: JsonOption = False,
) -> None:
    """Say why a molecule or a task is (not) done."""
    from orchestrator.status import explain as explained

    campaign, store = _campaign_of(place)
    lines = explained(campaign, store, what)
    if as_json:
        _print_json({"lines": lines})
    else:
        print("\n".join(lines))


@app.command()
def query(
    sql: Annotated[
        str,
        typer.Argument(
            metavar="SQL",
            help="SQL over molecules, geometries, relaxations, frames, paths, single_points, "
            "chains, chain_steps, exchanges, generations, tasks.",
        ),
    ],
    place: Place,
    as_json: JsonOption = False,
    csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Rows shown on a terminal.")] = 50,
) -> None:
    """Answer a DuckDB SQL query over the store's tables.

    A terminal shows the first rows, one below the other where they are too wide for it; into a
    pipe or a file goes all.
    """
    from orchestrator.show import answer_csv, show_answer

    if not os.path.exists(place) and os.path.exists(sql):
        raise CampaignError(f"the SQL comes first, then the store: basin query 'SELECT ...' {sql}")
    table = _open(place).query(sql)
    if as_json:
        _print_json(table.to_pylist())
    elif csv:
        answer_csv(table, sys.stdout.buffer)
    else:
        show_answer(table, limit if sys.stdout.isatty() else None)


@app.command()
def export(
    place: Place,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="File or folder to write.")],
    kind: Annotated[
        str, typer.Option("--as", help="parquet, sdf, extxyz or hdf5 (default: from the name).")
    ] = "",
    table: Annotated[str | None, typer.Option(help="Only this table (parquet).")] = None,
    stage: Annotated[str | None, typer.Option(help="Geometries of this stage.")] = None,
    frames: Annotated[bool, typer.Option("--frames", help="Whole paths (extxyz).")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target.")] = False,
) -> None:
    """Write results as Parquet, SDF, extended xyz or one HDF5 file."""
    from orchestrator.export import export as export_to

    if not kind and target.suffix not in _ENDINGS:
        raise typer.BadParameter(
            f"{target}: its ending {target.suffix!r} does not tell the format; say it with --as "
            "parquet, sdf, extxyz or hdf5",
            param_hint="TARGET",
        )
    kind = kind or _ENDINGS[target.suffix]
    print(
        export_to(
            _open(place), kind, target, table=table, stage=stage, frames=frames, overwrite=overwrite
        )
    )


@app.command()
def report(
    place: Place,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="Default: report.html in the store.")
    ] = None,
) -> None:
    """Write the report: one HTML file with figures, to read and send."""
    from orchestrator.report import write_report

    counts = None
    store = _open(place)
    try:
        from orchestrator.status import stand

        counts = stand(*_campaign_of(place)).counts
    except (CampaignError, StoreError):
        pass  # a store without its campaign file is reported from what it holds
    print(write_report(store, target or store.path / "report.html", counts=counts))


@app.command()
def speedup(
    place: Place,
    baseline: Annotated[
        str,
        typer.Option(
            metavar="STAGE",
            help="Relaxations to compare with (default: the first from an MMFF geometry).",
        ),
    ] = "",
    per_molecule: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Also write every pair of relaxations."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what diffusion, or another arm, saved against MMFF starts.

    Pairs in which bonds changed count nowhere; intervals are 95 % bootstrap intervals over
    molecules.
    """
    from orchestrator.speedup import compare, write_per_molecule
    from orchestrator.speedup_tables import tables, values

    found = compare(_open(place), baseline=baseline, order=_stage_names(place))
    if not found.arms:
        raise StoreError(
            f"{found.store.path}: no other relaxation goes back to the geometries that stage "
            f"{found.baseline!r} started from; a campaign has such an arm with a diffuse stage "
            "from its mmff stage, and a relax stage from that"
        )
    if per_molecule is not None:
        n = write_per_molecule(found, per_molecule)
        if not as_json:
            print(f"{per_molecule}: {n:,} pairs of relaxations\n")
    if as_json:
        _print_json(values(found))
    else:
        _print_parts(tables(found))


@app.command()
def boltzmann(
    place: Place,
    max_rmsd: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="Å",
            help="Discard a molecule whose minima of model and level differ by more (0.3).",
        ),
    ] = None,
    max_rest: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="KCAL/MOL",
            help="Discard one whose mean energy at the lowest n is higher above the minimum (5).",
        ),
    ] = None,
    per_chain: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Also write the numbers of every chain.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what chains sampled, by temperature and diffusion step.

    Errors are from autocorrelation times; intervals are 95 % bootstrap intervals over molecules.
    """
    from orchestrator.boltzmann import MAX_REST, MAX_RMSD, analyse
    from orchestrator.boltzmann_tables import tables, values, write_per_chain

    found = analyse(
        _open(place),
        max_rmsd=MAX_RMSD if max_rmsd is None else max_rmsd,
        max_rest=MAX_REST if max_rest is None else max_rest,
        order=_stage_names(place),
    )
    if per_chain is not None:
        n = write_per_chain(found, per_chain)
        if not as_json:
            print(f"{per_chain}: {n:,} chains\n")
    if as_json:
        _print_json(values(found))
    else:
        _print_parts(tables(found))


def _print_parts(parts: Iterable[Any]) -> None:
    """Print tables and lines for a person, one after the other."""
    from orchestrator.show import console as make_console

    console = make_console()
    for part in parts:
        console.print(part, markup=False)


def _stage_names(place: Path) -> list[str]:
    """Return a campaign's stages in its own order; none where its file is not to be had."""
    try:
        return [stage.name for stage in _campaign_of(place)[0].stages]
    except (CampaignError, StoreError):
        return []


def _saved(store: Store, campaign: Campaign) -> str:
    """Return what diffusion saved in a campaign, in one line; empty where there is none."""
    kernels: set[str] = {stage.kernel for stage in campaign.stages}
    if "diffuse" not in kernels:
        return ""
    from orchestrator.speedup import compare, saved_line

    try:
        return saved_line(compare(store, order=[stage.name for stage in campaign.stages]))
    except StoreError:
        return ""


@app.command()
def compact(place: Place) -> None:
    """Take sealed shards into segments now, as a run does by itself."""
    from orchestrator.compact import compact as take_in

    store = _open(place)
    print(f"{take_in(store):,} shards taken in")
    _print_problems(store.snapshot().problems)


@app.command()
def train(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="Training file.")],
    devices: Annotated[
        int | None, typer.Option("--devices", min=1, help="Processes, one GPU each, as [run].")
    ] = None,
    max_time: Annotated[
        str | None, typer.Option("--max-time", help='Stop this run after a time, as "30 min".')
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a diffusion model, or go on with a stopped training.

    Ctrl-C saves and stops; a second Ctrl-C stops at once, which loses a minute at most.
    """
    from orchestrator.quantities import TIME, QuantityError, parse_quantity
    from orchestrator.show import Shower, duration, training_line, training_panel

    limit = None
    if max_time is not None:
        try:
            limit = parse_quantity(max_time, TIME)
        except QuantityError as exc:
            raise typer.BadParameter(f"{max_time} {exc}", param_hint="--max-time") from None

    from orchestrator.train import stop_on_signals
    from orchestrator.train import train as train_model
    from orchestrator.train_file import load_training

    loaded = load_training(file)
    if devices is not None:
        run_on = loaded.run.model_copy(update={"devices": devices})
        loaded = loaded.model_copy(update={"run": run_on})
    shower = Shower(as_json=as_json, line=training_line, panel=training_panel)
    with stop_on_signals() as stop, shower:
        try:
            summary = train_model(loaded, max_time_s=limit, show=shower, stop=stop)
        except KeyboardInterrupt:
            print(
                "stopped at once; the same command goes on from the last saved state",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None
    if as_json:
        _print_json({"event": "end", **asdict(summary)})
    else:
        print(
            f"{summary.name}: {summary.step:,} steps, {summary.epoch:.1f} epochs in "
            f"{duration(summary.elapsed_s)}; validation loss {summary.validation:.4g}, best "
            f"{summary.best['validation']:.4g} at step {summary.best['step']:,.0f}"
        )
        print(f"best checkpoint: {summary.output}/best.safetensors")
        print(f"model card: {summary.card}\nreport: {summary.report}")
    if not summary.finished:
        if not as_json:
            print("not finished: the same command goes on from here", file=sys.stderr)
        raise typer.Exit(EXIT_UNFINISHED)


@app.command()
def doctor(
    site: Annotated[
        str | None,
        typer.Option("--site", envvar="BASIN_SITE", help="Look at this site more closely."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, and which engines and sites work here."""
    from orchestrator.doctor import examine

    found = examine(Path.cwd(), site)
    broken = any(f.state == "broken" for f in found)
    if as_json:
        _print_json([asdict(f) for f in found])
    else:
        width = max(len(f.what) for f in found)
        for f in found:
            print(f"{f.what:<{width}}  {f.state:<8} {f.detail}")
    if broken:
        raise typer.Exit(1)


def main() -> None:
    """Run the command; every error of Basin's own ends as one message, never a traceback."""
    try:
        app(prog_name="basin")
    except BasinError as exc:
        print(f"basin: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as exc:
        # The machine's doing (a full disk, a missing right), not a bug to be traced.
        where = f"{exc.filename}: " if exc.filename else ""
        print(f"basin: {where}{exc.strerror or exc}", file=sys.stderr)
        store = exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        sys.exit(StoreError.exit_code if store else BasinError.exit_code)


if __name__ == "__main__":
    main()
