"""The command line: arguments to dataclasses, one call, one line. The only file that prints.

Nothing heavy is imported before the arguments are read, so that help and mistakes answer at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dori.arguments import parser
from dori.errors import DoriError

if TYPE_CHECKING:
    from dori.audit.folders import OwnJudge
    from dori.audit.judge import Judge
    from dori.audit.loop import Subjects
    from dori.audit.plan import Plan
    from dori.edit import Edit
    from dori.locality.plan import Plan as LocalityPlan
    from dori.mitigate.wanda import Wanda
    from dori.sampling import Sampling

# What a run computes with, beside what these import.
AUDITING = ("dori.audit.folders", "dori.testbed.subjects", "dori.metrics.sscd")
LOCATING = ("dori.locality.loop", *AUDITING)
VERIFYING = ("dori.testbed.verify",)


def say(line: str) -> None:
    """Progress goes to the error stream; results go to standard output."""
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exit 0, 1 (a limit was exceeded) or 2 (bad input)."""
    arguments = parser().parse_args(argv)
    commands = {
        "audit": _audit,
        "report": _report,
        "compare": _compare,
        "locality": _locality,
        "erase": _erase,
        "testbed": _testbed,
        "sscd": _sscd,
    }
    try:
        status = commands[arguments.command](arguments)
    except DoriError as error:
        say(f"dori: {error}")
        status = 2
    except KeyboardInterrupt:
        say("dori: interrupted; everything finished is kept, and the same command resumes")
        status = 130
    sys.exit(status)


def _prepare() -> None:
    """Settings of the process: progress bars and advice of the libraries would bury ours; and two that save time."""
    import diffusers
    import torch
    import transformers

    from dori.allocator import keep_freed_memory

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_flush_denormal(True)
    keep_freed_memory()


def _audit(arguments: argparse.Namespace) -> int:
    if arguments.memories is None:
        if arguments.model != "testbed":
            raise DoriError("an audit needs images to look for; give --memories FOLDER")
        if arguments.controls or arguments.ordinary or arguments.twin or arguments.half or arguments.device != "cpu":
            raise DoriError(
                "without --memories the testbed is audited on its own images, beside its own twins, in float32 on the "
                "CPU; leave out --controls, --ordinary, --twin, --device and --half, or give --memories FOLDER"
            )
    _prepare()  # first: some advice comes while the libraries are imported
    from dori.audit.loop import audit
    from dori.compare import worst_mr
    from dori.report.render import render
    from dori.run import Run, write_text

    plan, given = _plan(arguments), _given(arguments.edit)
    run = Run(arguments.out, say=say, modules=AUDITING)
    with run.locked():
        subjects, judge = _audited(arguments, plan)
        _announce(
            subjects,
            plan,
            [edit.name for edit in given],
            limited=bool(arguments.limit_memories or arguments.limit_controls),
        )
        found = audit(subjects, plan=plan, judge=judge, run=run, given=given, say=say)
        write_text(arguments.out / "audit.json", found.to_json())
        write_text(arguments.out / "report.html", render(found, arguments.out, redact=arguments.redact))
    print(f"report: {arguments.out / 'report.html'}")
    return _over(worst_mr(found), arguments.fail_above)


def _plan(arguments: argparse.Namespace) -> "Plan":
    """The preset with what the arguments change."""
    import dataclasses

    from dori.audit.plan import PRESETS

    plan, nemo = PRESETS[arguments.preset](), None
    sampling = _sampling(arguments, plan)
    if plan.nemo is not None:
        tau = plan.nemo.tau_stds if arguments.nemo_tau is None else arguments.nemo_tau
        passes = 0 if arguments.nemo_unrefined else plan.nemo.max_refinement_passes
        nemo = dataclasses.replace(plan.nemo, variant=arguments.nemo, tau_stds=tau, max_refinement_passes=passes)
    wandas, sweep = plan.wandas, plan.wanda_sweep
    if wandas:
        first = _wanda(arguments, wandas[0])
        if arguments.wanda_sweep:
            sweep = tuple(dataclasses.replace(first, sparsity=share) for share in dict.fromkeys(arguments.wanda_sweep))
        wandas = (first, *wandas[1:])
    return dataclasses.replace(
        plan,
        wandas=wandas,
        wanda_sweep=tuple(one for one in sweep if one not in wandas),
        attack_random=arguments.attack_random or plan.attack_random,
        seed=arguments.seed,
        sampling_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        nemo=nemo,
        memories=arguments.limit_memories or plan.memories,
        controls=arguments.limit_controls or plan.controls,
    )


def _sampling(arguments: argparse.Namespace, plan: "Plan | LocalityPlan") -> "Sampling":
    """The sampling that the arguments ask for; a preset holds the testbed's."""
    from dori.sampling import Sampling, sampling_of

    return sampling_of(
        Sampling(plan.sampling_steps, plan.guidance_scale),
        testbed=arguments.model == "testbed",
        steps=arguments.sampling_steps,
        guidance_scale=arguments.guidance_scale,
    )


def _given(files: Sequence[Path]) -> "list[Edit]":
    """Edits from files; the file stands in the name, so that it is not taken for one that this audit computes."""
    import dataclasses

    from dori.edit import load_edit

    loaded = [(path, load_edit(path)) for path in files]
    return [dataclasses.replace(edit, name=f"{edit.name} ({path.name})") for path, edit in loaded]


def _announce(subjects: "Subjects", plan: "Plan", given: Sequence[str], *, limited: bool) -> None:
    """Which part of the images is audited, and what it will cost."""
    from dori.audit.schedule import audited, planned_cost
    from dori.cost import forecast, measured_speed

    some = audited(subjects, plan)
    pairs = [(some.memories, subjects.memories, "memories"), (some.controls, subjects.controls, "controls")]
    if any(len(part) < len(every) for part, every, _ in pairs):
        why = "--limit-memories, --limit-controls" if limited else f"preset {plan.preset}; --preset paper takes all"
        counts = " and ".join(f"{len(part)} of {len(every)} {name}" for part, every, name in pairs)
        say(f"auditing {counts} ({why})")
    say(forecast(planned_cost(subjects, plan, given), measured_speed(subjects.model)))


def _over(rate: float, limit: float | None) -> int:
    if limit is None or rate <= limit:
        return 0
    say(f"dori: the worst memorization rate, {rate:.2f}, is above {limit:.2f}")
    return 1


def _audited(arguments: argparse.Namespace, plan: "Plan") -> "tuple[Subjects, Judge]":
    """The model, the images and the judge that the arguments name."""
    if arguments.model == "testbed" and arguments.memories is None:
        from dori.testbed.subjects import testbed_judge, testbed_subjects

        subjects, judge = testbed_subjects(plan), testbed_judge()
    else:
        from dori.audit.folders import folder_subjects

        subjects, judge = folder_subjects(
            arguments.model,
            memories=arguments.memories,
            controls=arguments.controls,
            ordinary=arguments.ordinary,
            twins=arguments.twin,
            device=arguments.device,
            half=arguments.half,
        )
    return subjects, _own_judge(arguments).instead_of(judge, device=arguments.device)


def _own_judge(arguments: argparse.Namespace) -> "OwnJudge":
    from dori.audit.folders import OwnJudge

    return OwnJudge(arguments.clip, arguments.sscd, arguments.sscd_preprocessing, arguments.threshold)


def _wanda(arguments: argparse.Namespace, preset: "Wanda") -> "Wanda":
    """The preset's setting with what the arguments change."""
    import dataclasses

    from dori.model.stable_diffusion import EVERYWHERE

    places = tuple(place for place in EVERYWHERE if place in (arguments.wanda_places or preset.places))
    sparsity, site = arguments.wanda_sparsity or preset.sparsity, arguments.wanda_site or preset.site
    return dataclasses.replace(preset, sparsity=sparsity, places=places, site=site)


def _locality(arguments: argparse.Namespace) -> int:
    if arguments.memories is None:
        if arguments.model != "testbed":
            raise DoriError("locality needs images to look for; give --memories FOLDER")
        if arguments.ordinary or arguments.twin or arguments.half or arguments.device != "cpu":
            raise DoriError(
                "without --memories the testbed is analysed with its own images, beside its own twins, in float32 on "
                "the CPU; leave out --ordinary, --twin, --device and --half, or give --memories FOLDER"
            )
    _prepare()
    import dataclasses

    from dori.cost import measured_speed
    from dori.locality.costs import stage_table
    from dori.locality.loop import costs, locality, says_less
    from dori.locality.page.render import render
    from dori.locality.plan import PRESETS
    from dori.locality.records import Locality
    from dori.locality.subjects import choose_sets
    from dori.processes import started
    from dori.run import Run, write_text

    def write(found: Locality) -> None:
        write_text(arguments.out / "locality.json", found.to_json())
        write_text(arguments.out / "locality.html", render(found, arguments.out, redact=arguments.redact))

    def write_part(found: Locality) -> None:
        if not says_less(found, arguments.out / "locality.json"):  # a longer run's records stay until made again
            write(found)

    plan = PRESETS[arguments.preset]()
    sampling = _sampling(arguments, plan)
    plan = plan.of_size(memories=arguments.limit, attacks=arguments.attacks)
    wanda = _wanda(arguments, plan.wandas[-1])
    fewer = (dataclasses.replace(one, places=wanda.places, site=wanda.site) for one in plan.wandas[:-1])
    wandas = (*(one for one in fewer if one.sparsity < wanda.sparsity), wanda)
    patch_seeds = arguments.patch_seeds or plan.patch_seeds
    plan = dataclasses.replace(plan.drawn_by(sampling), seed=arguments.seed, wandas=wandas, patch_seeds=patch_seeds)
    processes = started(device=arguments.device)
    arguments.device = processes.device(arguments.device)
    if not processes.first:
        processes.wait()  # till the first one has the folder
        subjects, judge = _audited(arguments, plan.judging())
        locality(subjects, plan=plan, judge=judge, run=Run(arguments.out, modules=LOCATING), processes=processes)
        return 0
    run = Run(arguments.out, say=say, modules=LOCATING)
    with run.locked():
        processes.wait()
        subjects, judge = _audited(arguments, plan.judging())
        say(stage_table(costs(subjects, plan, choose_sets(subjects, plan)), measured_speed(subjects.model)))
        found = locality(subjects, plan=plan, judge=judge, run=run, say=say, after_part=write_part, processes=processes)
        write(found)
    print(f"page: {arguments.out / 'locality.html'}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from dori.findings import read_audit
    from dori.report.figures import overview
    from dori.report.render import render
    from dori.report.strip import strip
    from dori.report.tables import page_markdown
    from dori.run import write_bytes, write_text

    folder, redact = arguments.run, arguments.redact
    located = (folder / "locality.json").exists()
    asked = any(target is not None for target in (arguments.strip, arguments.curves, arguments.table))
    audit = read_audit(folder / "audit.json") if asked or not located or (folder / "audit.json").exists() else None
    if audit is not None and arguments.strip is not None:
        write_bytes(arguments.strip, strip(audit, folder, redact=redact))
        print(f"picture: {arguments.strip}")
    if audit is not None and arguments.curves is not None:
        write_bytes(arguments.curves, overview(audit))
        print(f"picture: {arguments.curves}")
    if audit is not None and arguments.table is not None:
        write_text(arguments.table, page_markdown(audit))
        print(f"table: {arguments.table}")
    if located:
        from dori.locality.page.render import render as render_locality
        from dori.locality.records import read_locality

        target = folder / "locality.html"
        write_text(target, render_locality(read_locality(folder / "locality.json"), folder, redact=redact))
        print(f"page: {target}")
    target = folder / "report.html"
    if audit is not None and target.exists() and not any((folder / s.picture).is_file() for s in audit.subjects):
        print(f"report: {target} stays as it is; its pictures are no longer in {folder}")
    elif audit is not None:
        write_text(target, render(audit, folder, redact=redact))
        print(f"report: {target}")
    return 0


def _erase(arguments: argparse.Namespace) -> int:
    _prepare()
    from dori.erase.command import Request, erase

    lines = erase(
        Request(
            arguments.model,
            arguments.out,
            memories=arguments.memories,
            retain=arguments.retain,
            controls=arguments.controls,
            twins=tuple(arguments.twin),
            base=arguments.base,
            preset=arguments.preset,
            eraser=arguments.eraser,
            table=arguments.table,
            rows=tuple(arguments.row),
            take=tuple(arguments.take),
            split=arguments.split,
            limit=arguments.limit,
            budget=arguments.budget,
            rate_scale=arguments.rate_scale,
            lora_relearning=arguments.lora_relearning,
            seed=arguments.seed,
            device=arguments.device,
            sampling_steps=arguments.sampling_steps,
            guidance_scale=arguments.guidance_scale,
            judge=_own_judge(arguments),
            save_model=arguments.save_model,
        ),
        say,
    )
    for line in lines:
        print(line)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from dori.compare import compare, to_text, worst_mr
    from dori.findings import read_audit

    before, after = (read_audit(folder / "audit.json") for folder in (arguments.before, arguments.after))
    print(to_text(compare(before, after)))
    return _over(worst_mr(after), arguments.fail_above)


def _testbed(arguments: argparse.Namespace) -> int:
    _prepare()
    if arguments.verb == "export":
        from dori.testbed.subjects import export_folders

        export_folders(arguments.out)
        print(f"memories, controls and ordinary images: {arguments.out}")
        return 0
    if arguments.verb == "verify":
        from dori.run import Run, write_json
        from dori.testbed.verify import to_text, verify

        run = Run(arguments.out, say=say, modules=VERIFYING)
        with run.locked():
            rows = verify(run)
            write_json(arguments.out / "verify.json", rows)
        print(to_text(rows))
        return 0 if all(row["reached"] for row in rows) else 1
    from dori.metrics.copy_training import CopyRecipe
    from dori.model.load import usable_device
    from dori.testbed.folder import DATA
    from dori.testbed.pipeline import train_testbed
    from dori.testbed.train import Recipe

    train_testbed(
        arguments.work,
        arguments.out or DATA,
        Recipe(device=str(usable_device(arguments.device))),
        CopyRecipe(),
        say=say,
        checkpoints=arguments.only,
        source=arguments.source,
    )
    return 0


def _sscd(arguments: argparse.Namespace) -> int:
    from dori.metrics.sscd import convert

    print(f"sha256 {convert(arguments.source, arguments.target, name=arguments.name)}  {arguments.source}")
    print(f"SSCD weights: {arguments.target}")
    return 0
