"""A measurement as lines for people; `bench.run` gives the numbers."""

from __future__ import annotations

from typing import Any

from tiercel.plan import human_bytes


def show(found: dict[str, Any]) -> None:
    """Print a table to stdout."""
    from rich.console import Console
    from rich.table import Table

    peers = found.get("peers", {})
    table = Table(box=None, pad_edge=False, header_style="")
    for head in ["", "tiercel tok/s", *([] if peers else ["min – max"])]:
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for head in (text for peer in peers for text in (f"{peer} tok/s", "ratio (min – max)")):
        table.add_column(head, justify="right", no_wrap=True)
    for what, name, own in _speeds(found):
        cells = [what, f"{own['median']:.1f}"] + ([] if peers else [f"{own['min']:.1f} – {own['max']:.1f}"])
        for peer in peers.values():
            theirs = peer["decode"] if name == "decode" else peer["prefill"][name.split()[1]]
            ratio = peer["ratios"][name]
            cells += [f"{theirs['median']:.1f}", f"{ratio['median']:.2f} × ({ratio['min']:.2f} – {ratio['max']:.2f})"]
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table, width=None if console.is_terminal else 160)
    print("\n" + "\n".join(f"{label:<13}{text}" for label, text in _facts(found)))


def _speeds(found: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, name of the ratio, numbers) of every row."""
    rows = f" of {found['batch']} rows" if found["batch"] > 1 else ""
    out = [(f"prefill {n}{rows}", f"prefill {n}", own) for n, own in found["prefill"].items()]
    if "decode" in found:
        after = f" after {found['context']:,}" if found["context"] else ""
        out.append((f"decode{rows}{after}", "decode", found["decode"]))
    return out


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    kind = f"{found['architecture']}, {found['parameters']:,} parameters"
    facts = [
        ("model", f"{found['model']}: {kind}" + (f", random weights {found['random']}" if found["random"] else "")),
        ("load", f"{found['load_s']:.2f} s; to the first token {found['first_token_s']:.2f} s, "
                 f"from the start of the process {found['process_s']:.2f} s"),
        ("memory", f"{human_bytes(found['peak_rss_bytes'])} at most, {human_bytes(found['weights_bytes'])} of weights"),
    ]  # fmt: skip
    if "peak_device_bytes" in found:
        facts.append(("of the GPU", f"{human_bytes(found['peak_device_bytes'])} at most"))
    if "decode" in found:
        limit = f"{found['read_share']:.0%} of the {found['bandwidth_gb_s']:.1f} GB/s measured"
        share = f"{found['read_gb_s']:.1f} GB/s, {limit}"
        facts.append(("decode reads", f"{human_bytes(found['bytes_per_token'])} per token: {share}"))
    if found.get("product_share"):
        shares = ", ".join(f"{length}: {share:.0%}" for length, share in found["product_share"].items())
        facts.append(("prefill", f"of the {found['product_tflops']:.0f} TFLOP/s of a bf16 product measured: {shares}"))
    for name, peer in found.get("peers", {}).items():
        facts.append((name, f"{peer['version']}, {human_bytes(peer['peak_rss_bytes'])} of memory at most"))
    where = found.get("device_name") or f"{found['machine']}, {found['threads']} thread(s)"
    turns = f"median of {found['repeat']} rounds in turn"
    return [*facts, ("measured", f"tiercel {found['version']}, {where}, {found['date']}, {turns}")]
