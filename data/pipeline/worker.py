"""What a worker does: one block in, its documents' tokens out. No state, so any worker may do any block."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data.filters.contamination import Contamination
from data.filters.near_duplicates import signatures
from data.filters.rules import Rule, codeparrot, license_rule
from data.pipeline.arguments import PreprocessArguments
from data.sources.blocks import Block, Position, Rejection, field_of
from data.sources.documents import Document, content_key, read_documents, split_document, utf8_length
from data.tokens.encoder import make_encoder
from data.tokens.fim import FimOptions, arrange


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """Everything a worker needs, small enough to be sent to another host."""

    args: PreprocessArguments
    tokenizer_json: str
    eos_token_id: int
    dtype: str
    contamination: Contamination | None
    fim: FimOptions | None


@dataclass(kw_only=True)
class Result:
    """A block's documents in order. A document is one or more sequences (`parts`) that end with the end-of-text token.

    tokens [sum of sizes], sizes [P] int32, text_bytes [P] int64, parts [D] int32, keys [D, 16] uint8, validation [D] bool.
    """

    after: Position
    done_bytes: int
    tokens: np.ndarray
    sizes: np.ndarray
    text_bytes: np.ndarray
    parts: np.ndarray
    keys: np.ndarray
    validation: np.ndarray
    signatures: list[bytes]
    origins: list[tuple[str, int | None]]  # name and line of each document
    numbers: list[int]  # of each document among those that were read
    rearranged: np.ndarray  # bool [P]: for fill-in-the-middle
    rejected: list[Rejection]
    removed: list[tuple[int, Rejection]]  # with the document's number
    read: int
    cut: int  # documents that were split because of their size


@dataclass(kw_only=True)
class Kept:
    """Documents of a block that go on to the tokenizer, with what was refused and removed on the way."""

    texts: list[list[str]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    origins: list[tuple[str, int | None]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    removed: list[tuple[int, Rejection]] = field(default_factory=list)
    read: int = 0


class Worker:
    """Holds the tokenizer and the rules; `run` is a pure function of the block."""

    def __init__(self, options: WorkOptions) -> None:
        self.options, self.args = options, options.args
        fim = options.fim
        ours = (options.eos_token_id, *((fim.prefix, fim.middle, fim.suffix) if fim else ()))
        self.encoder = make_encoder(options.tokenizer_json, self.args.encoder, ours)
        self.rules: list[Rule] = [codeparrot] if self.args.filter == "codeparrot" else []
        if self.args.licenses:
            self.rules.append(license_rule(self.args.licenses, self.args.license_field, field_of))
        if options.contamination:
            self.rules.append(options.contamination)

    def run(self, block: Block) -> Result:
        kept = self.select(block)
        keys = np.frombuffer(b"".join(kept.keys), np.uint8).reshape(-1, 16)
        validation = self.is_validation(keys)
        tokens, sizes, rearranged = self.encode(kept, validation)
        texts = [text for parts in kept.texts for text in parts]
        return Result(
            after=block.after,
            done_bytes=block.done_bytes,
            tokens=tokens,
            sizes=sizes,
            text_bytes=np.fromiter(map(utf8_length, texts), np.int64, len(texts)),
            parts=np.fromiter(map(len, kept.texts), np.int32, len(kept.texts)),
            keys=keys,
            validation=validation,
            signatures=signatures(["".join(parts) for parts in kept.texts]) if self.args.dedup == "near" else [],
            origins=kept.origins,
            numbers=kept.numbers,
            rearranged=rearranged,
            rejected=kept.rejected,
            removed=kept.removed,
            read=kept.read,
            cut=sum(len(parts) > 1 for parts in kept.texts),
        )

    def select(self, block: Block) -> Kept:
        """Parse the block and apply the rules; every document is kept, rejected or removed, and counted."""
        kept = Kept(rejected=list(block.rejections))
        limit = self.args.max_document_bytes
        for item in read_documents(block, self.args.text_field):
            kept.read += 1
            if not isinstance(item, Document):
                kept.rejected.append(item)
                continue
            reason = next((reason for rule in self.rules if (reason := rule(item.text, item.row))), None)
            if reason:
                kept.removed.append((kept.read, Rejection(item.name, item.line, reason)))
                continue
            parts = split_document(item.text, limit)
            if not parts:
                kind = f"a line of the text is longer than --max_document_bytes {limit}"
                kept.rejected.append(Rejection(item.name, item.line, kind))
                continue
            kept.texts.append(parts)
            kept.keys.append(content_key(item.text))
            kept.origins.append((item.name, item.line))
            kept.numbers.append(kept.read)
        return kept

    def is_validation(self, keys: np.ndarray) -> np.ndarray:
        """bool [D]: 8 bytes of a cryptographic hash as a fraction of 2^64; equal texts are in the same split of any job."""
        fraction = keys[:, :8].copy().view("<u8").reshape(-1).astype(np.float64) / 2.0**64
        return fraction < self.args.validation_fraction

    def encode(self, kept: Kept, validation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens of all parts back to back, end of text after each, in the shard's dtype; number of tokens of each part; whether
        it was rearranged)."""
        options = self.options
        pieces: list[tuple[str, int]] = []
        counts = []
        for parts, key, held_out in zip(kept.texts, kept.keys, validation, strict=True):
            fim = None if held_out and not self.args.fim_validation else options.fim
            for number, text in enumerate(parts):
                arranged = arrange(text, options.eos_token_id, key, number, fim)
                pieces += arranged
                counts.append(len(arranged))
        end_ids = np.fromiter((token for _, token in pieces), np.int32, len(pieces))
        tokens, lengths = self.encoder.encode([text for text, _ in pieces], end_ids)
        if len(counts) < len(pieces):
            lengths = np.add.reduceat(lengths, np.cumsum([0, *counts[:-1]]))
        return tokens.astype(options.dtype), lengths.astype(np.int32), np.array(counts, np.int32) > 1
