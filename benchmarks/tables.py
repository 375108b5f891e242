"""Writes the tables of README.md and docs/ from benchmarks/results/, so that no number there is typed by hand:

python benchmarks/tables.py            # rewrite
python benchmarks/tables.py --check    # exit 1 if a page is not what the files say
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PAGES = (README, *(ROOT / "docs" / f"{page}.md" for page in ("performance", "uptraining", "science")))

SHORT = (
    "window, rows of 256",
    "window",
    "supra, the paper's recipe",
    "supra, transfer and distillation",
    "hedgehog",
    "gated_delta, layers alike",
    "gated_delta, a state a head",
    "gated_delta",
    "window and delta rule",
    "window, one softmax layer",
    "one softmax layer by need",
)
"""Rows of the ablation that the README shows."""

_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo() -> str:
    found = _found("demo")
    header = ["", "teacher", "student before", "student after", "recovery"]
    names = {"acc": "acc", "acc_norm": "acc_norm", "perplexity": "perplexity", "nats_per_token": "nats per token"}
    body = [
        [
            f"`{line['task']}` {names[line['metric']]}",
            *(_figure(line[key]) for key in ("teacher", "before", "after")),
            "" if line["recovery"] is None else f"{100 * line['recovery']:.0f} %",
        ]
        for line in found["report"]["lines"]
        if line["metric"] in names
    ]
    nats, tokens, seconds = found["nats_per_token"], found["tokens"]["student"], found["seconds"]["student"]
    told = (
        f"{tokens:,} tokens of uptraining, {seconds:.0f} seconds on {found['environment']['threads']} threads of a "
        f"{found['environment']['cpus']}-core CPU. On the recipe's held-out rows the student ends "
        f"{found['above_teacher']:.2f} nats per token above its teacher ({nats['student']:.2f} against "
        f"{nats['teacher']:.2f}); a model of the same shape trained from scratch on as many tokens of the same text "
        f"ends at {nats['from_scratch']:.2f}."
    )
    return f"{_markdown(header, body)}\n{told}\n"


def operator() -> str:
    return _targets("operator-cpu", "CPU, fp32, one thread, B1 H4 D64", ".2f")


def operator_times() -> str:
    found = _found("operator-cpu")
    columns = {
        "T": "tokens",
        "forward": "forward_ms",
        "forward + backward": "forward_backward_ms",
        "SDPA forward": "sdpa_forward_ms",
        "SDPA forward + backward": "sdpa_forward_backward_ms",
    }
    rows = [
        [f"{row['tokens']}", *(_figure(row.get(key)) for key in list(columns.values())[1:])] for row in found["rows"]
    ]
    return _markdown(list(columns), rows)


def delta() -> str:
    rows = [
        [f"{row['tokens']}", row["decay"], *(_figure(row[key]) for key in ("ms", "softmax_ms", "over_softmax"))]
        for row in _found("delta-cpu")["rows"]
    ]
    return _markdown(["T", "a decay for each", "forward + backward", "SDPA's", "times faster"], rows)


def decode() -> str:
    times = {
        (row["model"] + form, row["position"]): row["ms"]
        for form, name in (("", "decode-cpu"), (", compiled", "decode-compiled-cpu"))
        for row in _found(name)["rows"]
    }
    positions = list(dict.fromkeys(at for _, at in times))
    rows = [[model, *(_figure(times[model, at]) for at in positions)] for model in dict.fromkeys(m for m, _ in times)]
    return _markdown(["model, ms per token", *(f"after {at:,} tokens" for at in positions)], rows)


def train() -> str:
    rows = [
        [
            row["mixer"],
            f"{row['batch']} × {row['tokens']}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['over_softmax']:.2f}",
        ]
        for row in _found("train-cpu")["rows"]
    ]
    return _markdown(["mixer", "batch × tokens", "tokens/s", "times faster than softmax"], rows)


def compiled() -> str:
    cases = ("gqa", "packed", "token", "gated", "t2r")
    found = {(row["kernel"], row["case"]): row for row in _found("compiled-sm90")["rows"]}

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        spilt = f" ({row['stack_bytes']})" if row["stack_bytes"] else ""
        return f"{row['registers']}{spilt} × {row['programs']}"

    rows = [
        [f"`{kernel}`", f"{next(row['warps'] for place, row in found.items() if place[0] == kernel)}"]
        + [cell(found.get((kernel, case))) for case in cases]
        for kernel in sorted({kernel for kernel, _ in found})
    ]
    return _markdown(["kernel", "warps", *cases], rows)


def compiled_cards() -> str:
    """For each card the most shared memory of any kernel, and the fewest programs of a kernel over chunks in bf16."""
    kinds = {"bf16": ("gqa", "packed", "token", "gated", "t2r", "wide"), "fp32": ("fp32", "fp32-gated", "fp32-wide")}
    rows = []
    for target in (80, 86, 89, 90):
        found = _found(f"compiled-sm{target}")
        most = {
            kind: max(
                row["shared_bytes"] for row in found["rows"] if row["case"].removesuffix("-token-packed-sums") in cases
            )
            for kind, cases in kinds.items()
        }
        sides = [row for row in found["rows"] if row["case"] == "gqa" and "_side" in row["kernel"]]
        rows.append(
            [
                f"{target / 10:.1f}",
                *(f"{count:,}" for count in (found["shared_bytes"], most["bf16"], most["fp32"])),
                f"{min(row['programs'] for row in sides)}",
                f"{max(row['stack_bytes'] for row in sides)}",
            ]
        )
    header = ["compute capability", "bytes a program may have", "most in bf16", "most in fp32"]
    return _markdown([*header, "programs of a side, `gqa`", "its most stack"], rows)


def compiled_blocks() -> str:
    found = _found("compiled-blocks")
    header = ["B, T, H, K = V", "decay", "as it runs, ms", "compiled, ms", "times faster"]
    rows = [
        [
            ", ".join(f"{row[key]}" for key in ("batch", "tokens", "heads", "width")),
            row["decay"],
            *(_figure(row[key]) for key in ("plain_ms", "compiled_ms")),
            f"{row['times_faster']:.2f}",
        ]
        for row in found["rows"]
    ]
    return _markdown(header, rows)


def memory(device: str = "cpu") -> str:
    found = _found(f"memory-{device}")
    rows = [
        [
            row["case"],
            f"{row['planned_mib']:.0f}",
            f"{row['measured_mib']:.0f}",
            f"{row['planned_over_measured']:.3f}",
        ]
        for row in found["rows"]
    ]
    return _markdown(["a step of", "planned MiB", "measured MiB", "planned / measured"], rows)


def operator_gpu() -> str:
    columns = {
        "T": "tokens",
        "forward": "forward_ms",
        "forward + backward": "forward_backward_ms",
        "SDPA": "sdpa_forward_backward_ms",
        "flash-linear-attention": "fla_forward_backward_ms",
    }
    rows = [
        [
            f"{row['tokens']:,}",
            *(_figure(row[key]) for key in list(columns.values())[1:]),
            *(f"{row[key]:.2f}" for key in ("over_softmax", "over_fla", "share_of_copy_rate")),
        ]
        for row in _found("operator-gpu")["rows"]
    ]
    return _markdown([*columns, "× SDPA", "× fla", "share of a copy's rate"], rows)


def step_gpu() -> str:
    columns = {"batch": "batch", "tokens/s through 32 layers": "tokens_per_s", "GB/s": "gb_per_s"}
    columns["a copy, GB/s"] = "copy_gb_per_s"
    rows = [
        [*(f"{row[key]:,.0f}" for key in columns.values()), f"{row['share_of_copy_rate']:.2f}"]
        for row in _found("decode-step-gpu")["rows"]
    ]
    return _markdown([*columns, "share"], rows)


def uptrain_gpu() -> str:
    rows = [
        [
            f"`{found['model']}`, {row['layers']} layers",
            f"{row['batch']} × {row['tokens']:,}",
            row["mixer"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['mfu']:.2f}",
            f"{row['over_softmax']:.2f}",
        ]
        for found in (_found("uptrain-1b-gpu"), _found("uptrain-7b-gpu"))
        for row in found["rows"]
    ]
    return _markdown(["shape", "batch × tokens", "mixer", "tokens/s", "MFU", "times faster than softmax"], rows)


def overhead() -> str:
    return _targets("overhead-cpu", "the loop on one rank", ".4f")


def parallel() -> str:
    header = ["stage", "tokens a step", "1 process, tokens/s", "2 processes", "times faster", "quartiles", "apart"]
    rows = [
        [
            row["stage"],
            f"{row['tokens_per_step']:,}",
            *(f"{row[f'{form}_tokens_per_s']:,.0f}" for form in ("alone", "together")),
            f"{row['times_faster']:.2f}",
            f"{row['lower_quartile']:.2f} to {row['upper_quartile']:.2f}",
            f"{row['apart_times_faster']:.2f}",
        ]
        for row in _found("parallel-cpu")["rows"]
    ]
    return _markdown(header, rows)


def saving() -> str:
    found = _found("saving-cpu")
    forms = {
        "plain": "safetensors.save_file and fsync",
        "alone": "a save of a run, 1 rank",
        "together": "a save of a run, 2 ranks",
        "dcp": "torch.distributed.checkpoint, 2 ranks",
    }
    rows = [
        [
            forms[row["form"]],
            f"{row['seconds']:.2f}",
            f"{row['over_plain']:.2f}",
            f"{row['least']:.2f} to {row['most']:.2f}",
            *(_figure(row.get(f"{when}_peak_mib")) for when in ("step", "save")),
        ]
        for row in found["rows"]
    ]
    header = [f"{found['bytes'] / 1e6:,.0f} MB", "seconds", "over the plain write", "least to most"]
    return _markdown([*header, "peak MiB of the step", "of the save"], rows)


def convert() -> str:
    found = _found("convert-cpu")
    new = found["rows"][0]["new_bytes"]
    columns = {
        f"{found['base_bytes'] / 1e9:.1f} GB, seconds": "seconds",
        f"cp and fsync of {new / 1e6:,.0f} MB, seconds": "copy_seconds",
        "over": "over_copy",
        "MB above imports": "above_imports_mb",
    }
    rows = [[_figure(row[key]) for key in columns.values()] for row in found["rows"]]
    asked = _targets("convert-cpu", "the median of the rounds, of memory the most", ".2f")
    return f"{_markdown(list(columns), rows)}\n{asked}"


def curves() -> str:
    found = _found("curves")
    ends = {(entry["mixer"], bool(entry["transferred"])): entry for entry in found["runs"]}
    header = ["mixer", "untrained", "distill alone", "transfer, then distill", "transfer gains", "layers' errors"]
    body = []
    for name in dict.fromkeys(name for name, _ in ends):
        alone, first = ends[name, False]["curve"], ends.get((name, True))
        line = [f"`{name}`", f"{alone[0][1]:.2f}", f"{alone[-1][1]:.2f}"]
        if first:
            both, layers = first["curve"][-1][1], first["transfer_loss"]
            mean = [sum(layer[when] for layer in layers) / len(layers) for when in ("first", "last")]
            line += [f"{both:.2f}", f"{alone[-1][1] - both:+.2f}", f"{mean[0]:.2f} → {mean[1]:.2f}"]
        body.append([*line, "", "", ""][: len(header)])
    told = (
        f"Held-out nats per token after {found['tokens']:,} tokens, the teacher being at "
        f"{found['runs'][0]['teacher']:.2f}; the transfer, where there is one, took "
        f"{max(entry['transferred'] for entry in found['runs']):,} of them. The last column is the mean of the layers' "
        "relative squared errors at the first and the last step of the transfer."
    )
    return f"{_markdown(header, body)}\n{told}\n"


def ablation(*names: str) -> str:
    """Medians over seeds; of the rows named, or of all."""
    runs: dict[str, list[dict]] = {}
    for run in _found("ablation")["runs"]:
        runs.setdefault(run["row"], []).append(run)

    def line(name: str, seeds: list[dict]) -> list[str]:
        ends, teacher = [run["curve"][-1] for run in seeds], seeds[0]["teacher"]
        gaps = [label for label in teacher["repeats"] if label.startswith("random")]
        recalled = [statistics.median(end["repeats"][at][0] for end in ends) for at in gaps]
        taught = [teacher["repeats"][at][0] for at in gaps]
        return [
            name,
            f"{len(seeds)}",
            f"{seeds[0]['tokens']:,}",
            f"{seeds[0]['state_bytes'] / 1024:.0f}",
            f"{statistics.median(end['nats'] for end in ends) - teacher['nats']:.3f}",
            " / ".join(at.rpartition(" ")[2] for at in gaps),
            " / ".join(f"{share:.2f}" for share in recalled),
            " / ".join(f"{share:.2f}" for share in taught),
        ]

    header = ["student", "seeds", "tokens", "state, KiB", "nats above its teacher", "gaps", "repeats", "its teacher's"]
    return _markdown(header, [line(name, runs[name]) for name in names or runs if name in runs])


def smollm2() -> str:
    """What each student of a pretrained model lost, recalls and costs; the base's own decoding stands beside each."""
    found = _found("smollm2-cpu")["models"]
    names = {"window": "window, untrained"} | {name: f"`{name}`" for name in found if name not in ("teacher", "window")}
    at = (512, 32_768)
    costs = {}
    for name in names:
        for row in found[name]["decoding"]["rows"]:
            costs.setdefault("teacher" if row["model"] == "softmax" else name, {})[row["position"]] = row
    gaps = list(found["teacher"]["text"]["repeats"])
    lengths = list(found["teacher"]["needle"]["results"]["niah_single_1"])

    def line(name: str) -> list[str]:
        text, needle = found[name]["text"], found[name]["needle"]["results"]["niah_single_1"]
        return [
            names.get(name, name),
            f"{sum(found[name].get('training', {}).get('tokens', ())):,}",
            f"{text['nats'] - found['teacher']['text']['nats']:.2f}",
            " / ".join(f"{text['repeats'][gap][0]:.2f}" for gap in gaps),
            " / ".join(f"{needle[length]['student']:.2f}" for length in lengths),
            " / ".join(_figure(costs[name][tokens]["ms"]) for tokens in at),
            " / ".join(_figure(costs[name][tokens]["cache_bytes"] / 2**20) for tokens in at),
        ]

    header = [
        "SmolLM2-135M",
        "tokens",
        "nats above the teacher",
        f"repeats: {' / '.join(gap.replace(', gap', '') for gap in gaps)}",
        f"niah_single_1 at {' / '.join(lengths)}",
        f"ms per token behind {' / '.join(f'{tokens:,}' for tokens in at)}",
        "MiB of cache there",
    ]
    return _markdown(header, [line(name) for name in ("teacher", *names)])


def bases() -> str:
    """What tests/laws tries of every registered base with every registered mixer."""
    sys.path[1:1] = [str(ROOT / "tests"), str(ROOT / "tests" / "laws")]
    import pairs

    from supra_cli.core.archs import archs
    from supra_cli.core.mixers import mixers

    one = {pair for law in pairs.dealt().values() for pair in law}

    def tried(base: str, mixer: str) -> str:
        return "all" if pairs.usual(base, mixer) else "one" if (base, mixer) in one else ""

    body = [[f"`{base}`", *(tried(base, mixer) for mixer in mixers)] for base in archs]
    return _markdown(["", *(f"`{mixer}`" for mixer in mixers)], body)


def render(text: str) -> str:
    """`text` with every block between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    tables = {
        "bases": bases,
        "demo": demo,
        "operator": operator,
        "operator-times": operator_times,
        "decode": decode,
        "train": train,
        "compiled": compiled,
        "compiled-blocks": compiled_blocks,
        "compiled-cards": compiled_cards,
        "memory": memory,
        "memory-gpu": partial(memory, "gpu"),
        "operator-gpu": operator_gpu,
        "step-gpu": step_gpu,
        "uptrain-gpu": uptrain_gpu,
        "overhead": overhead,
        "parallel": parallel,
        "saving": saving,
        "convert": convert,
        "curves": curves,
        "delta": delta,
        "delta-targets": partial(_targets, "delta-cpu", "CPU, fp32, one thread, B1 H4 D64", ".2f"),
        "smollm2": smollm2,
        "ablation": ablation,
        "ablation-short": partial(ablation, *SHORT),
    }
    return _BLOCK.sub(lambda match: f"{match[1]}{tables[match[2]]()}{match[3]}", text)


def _targets(name: str, title: str, form: str) -> str:
    rows = [
        [
            target["what"],
            f"{target['bound']} {target['target']:g}",
            format(target["measured"], form),
            "yes" if target["met"] else "no",
        ]
        for target in _found(name)["targets"]
    ]
    return _markdown([title, "asked", "measured", "met"], rows)


def _found(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        wanted = render(text)
        stale += text != wanted
        if not arguments.check:
            page.write_text(wanted, encoding="utf-8")
    return int(arguments.check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
