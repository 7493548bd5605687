"""The preprocessing job: arguments checked, work done in order, state kept, manifest last."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import UserError, one_line
from data.files import replace_json
from data.filters.contamination import Contamination
from data.pipeline.arguments import PreprocessArguments
from data.pipeline.benchmarks import describe as describe_benchmarks
from data.pipeline.benchmarks import load_contamination
from data.pipeline.duplicates import Duplicates
from data.pipeline.inputs import InputFile, check_inputs, check_unchanged, list_inputs, write_inputs
from data.pipeline.ledger import REJECTED, REMOVED, Ledger, check_flags, check_same, clear_leftovers, input_listing
from data.pipeline.pool import Team
from data.pipeline.tokenizer_text import sample_texts
from data.pipeline.worker import Result, WorkOptions
from data.pipeline.writer import SplitWriter
from data.shards import FORMAT_NAME, FORMAT_VERSION, MANIFEST, SPLITS, dtype_for, load_manifest
from data.sources.blocks import CANNOT_BE_READ, Block, Position, ReadOptions, Rejection
from data.sources.discover import Source, describe_endings, find_sources
from data.sources.documents import EMPTY
from data.sources.read import read_blocks
from data.terminal import Progress, say, stdout
from data.tokens import tokenizer as tokenizers
from data.tokens.fim import FimOptions
from data.tokens.folder import CONFIG, TokenizerFiles, load
from data.tokens.tokenizer import TokenizerFacts

#: At most this much work is lost to a kill; the end of a shard is saved at once.
STATE_INTERVAL_S = 20.0
#: Files named on the screen when they cannot be used; all of them are in rejected.jsonl.
WARNINGS = 20


def identity(args: PreprocessArguments, sources: list[Source]) -> dict[str, Any]:
    """The arguments and the input that decide the output's bytes."""
    return args.identity() | {"decontaminate": describe_benchmarks(args.decontaminate), "input_files": input_listing(sources)}


def run(args: PreprocessArguments, team: Team | None = None) -> None:
    """Do the job or go on with it, until the folder is complete. `team`: who works, if not processes of this host."""
    sources = find_sources(args.input, exclude=args.output, suffixes=args.suffixes)
    wanted, inputs = identity(args, sources), list_inputs(sources, args.decontaminate)
    check_flags(args.output, wanted)
    check_inputs(args.output, inputs)
    check_tokenizer(args)
    if (args.output / MANIFEST).is_file():
        check_same(load_manifest(args.output)["arguments"], wanted, args.output)
        clear_leftovers(args.output)
        say(f"{args.output} is complete; nothing to do", stdout)
        return
    contamination = load_contamination(args.decontaminate)
    say_left_out(sources)
    started = time.monotonic()
    with Ledger.open(args.output, wanted) as ledger:
        write_inputs(args.output, inputs)
        text, facts = prepare_tokenizer(args, sources)
        job = Job(args, sources, inputs, ledger, facts)
        try:
            manifest = job.run(team or Team(args.workers), work_options(args, text, facts, contamination))
        finally:
            job.close()
    report(manifest, args, time.monotonic() - started)


def check_tokenizer(args: PreprocessArguments) -> None:
    """Raises UserError where the file of --tokenizer is another one than that whose copy the folder has, and goes on with."""
    copy = args.output / "tokenizer"
    if args.tokenizer is None or not os.path.exists(args.tokenizer) or not (copy / CONFIG).is_file():
        return
    now, then = load(args.tokenizer), load(str(copy))
    changed = now.end_token not in (None, then.end_token)
    if now.text != then.text:  # saved anew, a file has other white space or a post-processor, and the same ids
        tokenizers.library_tokenizer(args.tokenizer, now.text)
        changed |= tokenizers.fingerprint(now.text) != tokenizers.fingerprint(then.text)
    if changed:
        raise UserError(f"--tokenizer {args.tokenizer} was written to since {args.output} was begun; name another --output")


def prepare_tokenizer(args: PreprocessArguments, sources: list[Source]) -> tuple[str, TokenizerFacts]:
    """Load or train it, and keep a copy in `tokenizer/`; a job that goes on uses that copy."""
    folder = args.output / "tokenizer"
    name = args.tokenizer or f"trained, {args.train_tokenizer} tokens"
    if (folder / CONFIG).is_file():
        files = load(str(folder))
    elif args.train_tokenizer is None:
        files = load(name)
    else:
        say(f"training a tokenizer of {args.train_tokenizer:,} tokens on a sample of the input", stdout)
        files = TokenizerFiles(tokenizers.train(sample_texts(args, sources), args.train_tokenizer))
    tokenizer = tokenizers.library_tokenizer(name, files.text)
    facts = tokenizers.facts(name, files, tokenizer)
    tokenizers.save(folder, files.text, facts)
    say(f"documents end with {facts.eos_token!r} (id {facts.eos_token_id}{', ' if files.named_by else ''}{files.named_by})", stdout)
    fim = (facts.fim or {}) if args.fim_rate else {}
    tokenizers.check_reach(name, files.text, {facts.eos_token: facts.eos_token_id, **{f"<fim_{t}>": i for t, i in fim.items()}})
    if fim:
        tokenizers.check_cuts(name, tokenizer)
    if lossy := tokenizers.lossy_example(tokenizer):
        say(f"warning: tokenizer {name} does not keep text: {lossy[0]!r} comes back as {lossy[1]!r}")
    return files.text, facts


def work_options(args: PreprocessArguments, text: str, facts: TokenizerFacts, contamination: Contamination | None) -> WorkOptions:
    fim = None
    if args.fim_rate:
        if facts.fim is None:
            raise UserError(f"--fim_rate needs the tokens <fim_prefix>, <fim_middle> and <fim_suffix>, which {facts.name} lacks")
        fim = FimOptions(rate=args.fim_rate, spm_rate=args.fim_spm_rate, seed=args.seed, **facts.fim)
    return WorkOptions(
        tokenizer_json=text,
        eos_token_id=facts.eos_token_id,
        dtype=dtype_for(facts.vocab_size),
        text_field=args.text_field,
        max_document_bytes=args.max_document_bytes,
        validation_fraction=args.validation_fraction,
        encoder=args.encoder,
        filter=args.filter,
        licenses=args.licenses or (),
        license_field=args.license_field,
        near=args.dedup == "near",
        contamination=contamination,
        fim=fim,
        fim_validation=args.fim_validation,
    )


def read_options(args: PreprocessArguments) -> ReadOptions:
    """The columns that anything looks at: a table's others are never decoded."""
    columns = (args.text_field, args.license_field, "autogenerated")
    return ReadOptions(columns=columns, needed=(args.text_field,), suffixes=args.suffixes, hub_split=args.split)


class Job:
    """Consumes results in document order: duplicates out, shards written, state saved."""

    def __init__(
        self, args: PreprocessArguments, sources: list[Source], inputs: list[InputFile], ledger: Ledger, facts: TokenizerFacts
    ) -> None:
        self.args, self.sources, self.inputs, self.ledger, self.facts = args, sources, inputs, ledger, facts
        state = ledger.state
        self.dtype = dtype_for(facts.vocab_size)
        saved = state.get("splits", {})
        self.writers = {s: SplitWriter(args.output / s, self.dtype, args.shard_tokens, saved.get(s)) for s in SPLITS}
        self.position = Position(**state.get("position", {}))
        self.done_bytes: int = state.get("done_bytes", 0)
        self.counts: Counter[str] = Counter(state.get("counts", {}))
        self.rejected: Counter[str] = Counter(state.get("rejected", {}))
        self.removed: Counter[str] = Counter(state.get("removed", {}))
        self.unreadable: list[str] = state.get("unreadable", [])
        self.duplicates = Duplicates(args.dedup, ledger, args.output)

    def run(self, team: Team, options: WorkOptions) -> dict[str, Any]:
        total = sum(max(s.size, 0) for s in self.sources)
        progress = Progress(total, what="preprocess", done=self.done_bytes)
        read_before = self.counts["read"]
        blocks = read_blocks(self.sources, read_options(self.args), self.position)
        saved_at = time.monotonic()
        with team.start(options) as results_of:
            for result in results_of(_say_notes(blocks)):
                closed = self.consume(result)
                read = self.counts["read"] - read_before
                progress.update(result.done_bytes, f"{read:,} documents, {read / progress.seconds:,.0f} documents/s")
                if closed or time.monotonic() - saved_at > STATE_INTERVAL_S:
                    self.save()
                    saved_at = time.monotonic()
        progress.close()
        return self.finish()

    def consume(self, result: Result) -> bool:
        """Write one block's documents. True where a shard was closed."""
        self.check_readable(result.rejected)
        self.reject(result.rejected)
        fresh = self.duplicates.fresh(result)
        closed = False
        for split, chosen in (("train", fresh & ~result.validation), ("validation", fresh & result.validation)):
            parts = np.repeat(chosen, result.parts)
            tokens = result.tokens if parts.all() else result.tokens[np.repeat(parts, result.sizes)]
            closed |= self.writers[split].add(tokens, result.sizes[parts], result.text_bytes[parts])
            self.counts["fill_in_the_middle"] += int(result.rearranged[parts].sum())
        self.counts.update(read=result.read, split_at_line_ends=result.cut)
        # In the order of the input, by whichever rule: where a block ends must not show in the list.
        for _, removal in sorted(result.removed, key=itemgetter(0)):
            self.removed[removal.kind] += 1
            self.ledger.append_rejection(REMOVED, removal)
        self.position, self.done_bytes = result.after, result.done_bytes
        return closed

    def check_readable(self, rejected: Iterable[Rejection]) -> None:
        """Raises UserError for files that could be read when the job began, so that an outage of their disk does not leave them
        out for good. One that breaks off a second time is a rejection: of a bad sector nothing more is to be had. One that is gone
        altogether never is, as a start without it is refused, too (`check_inputs`)."""
        suspects = {r.name: r for r in rejected if r.line is None and r.kind == CANNOT_BE_READ}
        lost = [f.name for f in self.inputs if f.bytes >= 0 and f.name in suspects] if suspects else []
        gone = {name for name in lost if InputFile.of(name).bytes < 0}
        lost = [name for name in lost if name in gone or name not in self.unreadable]
        if not lost:
            return
        self.unreadable += [name for name in lost if name not in gone]
        self.save()
        more = f", nor can {len(lost) - 1} more," if len(lost) > 1 else ""
        if gone:
            advice = "when that is mended the same command goes on there; to do without, name another --output"
        else:
            advice = "the same command goes on there, and leaves out what still breaks off there"
        raise UserError(f"{lost[0]} {suspects[lost[0]].reason}{more} and could be when the job began; {advice}")

    def reject(self, rejected: Iterable[Rejection]) -> None:
        for rejection in rejected:
            name, line, kind = rejection[:3]
            if self.args.on_error == "fail" and not (line is None and kind == EMPTY):  # every package has an empty __init__.py
                where = f"{name} line {line}" if line else name
                raise UserError(f"{where}: {rejection.reason} (--on_error skip counts such documents and goes on)")
            self.rejected[kind] += 1
            self.ledger.append_rejection(REJECTED, rejection)
            if line is None and kind != EMPTY and self.rejected.total() <= WARNINGS:
                say(one_line(f"warning: {name}: {rejection.reason}"))

    def save(self) -> None:
        """Make everything up to the last block durable."""
        self.ledger.save(
            splits={s: w.state() for s, w in self.writers.items()},
            position=asdict(self.position),
            done_bytes=self.done_bytes,
            counts=self.counts,
            rejected=self.rejected,
            removed=self.removed,
            unreadable=self.unreadable,
        )
        for writer in self.writers.values():
            writer.forget()

    def finish(self) -> dict[str, Any]:
        """Close the last shards and publish the manifest."""
        check_unchanged(self.args.output, self.inputs)
        for writer in self.writers.values():
            writer.close_shard()
        summaries = {s: w.summary() for s, w in self.writers.items()}
        if not any(s["documents"] for s in summaries.values()):
            why = ", ".join(f"{n} x {reason}" for reason, n in (self.rejected + self.removed).items()) or "the input is empty"
            if f"no field {self.args.text_field}" in self.rejected:
                why += "; name the field that holds the text with --text_field (rejected.jsonl says which there are)"
            raise UserError(f"no documents in {' '.join(self.args.input)}: {self.counts['read']} read; {why}")
        manifest = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "dtype": self.dtype,
            "tokenizer": asdict(self.facts),
            "arguments": self.ledger.state["arguments"],
            "documents": {
                "read": self.counts["read"],
                "split_at_line_ends": self.counts["split_at_line_ends"],
                **({"fill_in_the_middle": self.counts["fill_in_the_middle"]} if self.args.fim_rate else {}),
                "rejected": dict(sorted(self.rejected.items())),
                "removed": dict(sorted(self.removed.items())),
            },
            "splits": summaries,
        }
        self.ledger.sync()
        replace_json(self.args.output / MANIFEST, manifest)
        return manifest

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def say_left_out(sources: list[Source]) -> None:
    """What of the folders and trees is not read, so that nobody learns it from the result."""
    for source in sources:
        if source.left_out:
            where = source.name if source.kind == "tree" else os.path.dirname(source.name)
            hint = "; --suffixes names the endings of source files" if source.kind == "tree" else ""
            say(one_line(f"note: {where}: {describe_endings(source.left_out)} left out{hint}"), stdout)


def _say_notes(blocks: Iterable[Block]) -> Iterator[Block]:
    """What of archives is not read is known when they are."""
    for block in blocks:
        if block.note:
            say(one_line(f"note: {block.note}"), stdout)
        yield block


def report(manifest: dict[str, Any], args: PreprocessArguments, seconds: float) -> None:
    """What was made, for a person."""
    output = args.output
    for split in SPLITS:
        s = manifest["splits"][split]
        size = f"{s['documents']:,} documents, {s['tokens']:,} tokens, {s['text_bytes']:,} bytes of text"
        say(f"{split}: {size}, {len(s['shards'])} shards", stdout)
    counts = manifest["documents"]
    for reason, count in counts["rejected"].items():
        say(f"rejected {count:,}: {reason} (see {output / 'rejected.jsonl'})", stdout)
    for reason, count in counts["removed"].items():
        say(f"removed {count:,}: {reason} (see {output / 'removed.jsonl'})", stdout)
    for file in args.decontaminate:
        if (reason := f"overlaps {Path(file).name}") not in counts["removed"]:
            say(f"removed 0: {reason}", stdout)
    if "fill_in_the_middle" in counts:
        say(f"rearranged for fill-in-the-middle: {counts['fill_in_the_middle']:,} documents or parts of long ones", stdout)
    rate = sum(s["tokens"] for s in manifest["splits"].values()) / max(seconds, 1e-9)
    say(f"{output}: {counts['read']:,} documents read in {seconds:.1f} s, {rate:,.0f} tokens/s", stdout)
    if not manifest["splits"]["validation"]["documents"]:
        say("note: no document fell into the validation split; raise --validation_fraction to evaluate on these shards", stdout)
