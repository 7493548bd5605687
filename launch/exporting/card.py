"""The model card of an exported folder: what the run's own files say, and nothing that they do not."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import read_object
from data.redact import redact
from data.shards import LISTING_BYTES, MANIFEST
from launch.checkpoint.folder import run_of
from launch.reporting.read import parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Judged = dict[int, dict[str, Any]]  # a row of the metrics by its step
TITLE = "# A Mixture-of-Experts code model"
#: To the last name of a path that begins at the root or at home, also after a flag's `=`: where it lies is the host's business.
FOLDERS = re.compile(r"(^|=)[/~](?:[^/]*/)*(?=[^/])")
INTENDED = """, for people who read what it writes. It is a base model: it continues
text and has not been taught to follow instructions, to refuse, or to be safe in a conversation."""
LICENSE = """None was chosen for these weights: name one above, as `license`, before anybody else is given them. Under which
licenses the data stands is under Data, as far as it was recorded."""
CODE_LICENSE = (
    " The two Python files beside the weights are under the Apache License 2.0 (https://www.apache.org/licenses/LICENSE-2.0)."
)
LIMITS = """What it writes may be wrong, insecure, or close to a document that it was trained on, whose license then
holds; run it in a sandbox and review it as a stranger's patch. It knows nothing after its data was collected."""


def model_card(model: PreTrainedModel, checkpoint: Path) -> str:
    """Markdown with the front matter that the hub reads. `checkpoint`: runs/R/checkpoints/step_N."""
    run = redact(read_object(run_of(checkpoint) / "config.json"))  # a run of an older version may not have
    state = read_object(checkpoint / "state.json")
    kind = model.config.model_type
    front = f"library_name: transformers\npipeline_tag: text-generation\nlicense: unknown\ntags: [code, moe, {kind}]"
    sections = [
        f"---\n{front}\n---",
        TITLE,
        size(model),
        lengths(model.config, state),
        "## Training\n\n" + "\n".join(f"- {line}" for line in training_lines(run, state, *logged(checkpoint, state))),
        "## Data\n\n" + "\n".join(f"- {line}" for line in data_lines(run)),
        f"## Intended use\n\n{intended(fim_rate(checkpoint))}",
        f"## Limits\n\n{LIMITS}",
        "## License\n\n" + LICENSE + (CODE_LICENSE if kind == "moe_gpt" else ""),
        f"## Loading\n\n{loading(model.config)}",
    ]
    return "\n\n".join(sections) + "\n"


def size(model: PreTrainedModel) -> str:
    config, parameters = model.config, list(model.named_parameters())
    total = sum(p.numel() for _, p in parameters)
    routed = sum(p.numel() for name, p in parameters if ".mlp.experts." in name)
    active = total - routed // config.n_routed_experts * (config.n_routed_experts - config.num_experts_per_tok)
    return (
        f"{total:,} parameters, of which a token uses {active:,}: {config.num_hidden_layers} layers, {config.n_routed_experts} "
        f"experts of which a token uses {config.num_experts_per_tok}, and {config.n_shared_experts} that every token uses."
    )


def lengths(config: Any, state: dict[str, Any]) -> str:
    """What it was trained on, and how far its positions reach, which servers take for its context."""
    trained, rope = _object(state, "identity").get("sequence_length"), config.rope_parameters or {}
    reach = f"positions up to {config.max_position_embeddings:,}"
    if rope.get("factor", 1.0) != 1.0:
        before = _number(rope.get("original_max_position_embeddings"))
        reach += f" ({rope.get('rope_type')}, factor {rope['factor']:g}, from {before})"
    return f"Trained on sequences of {_number(trained)} tokens; {reach}." if trained else f"{reach.capitalize()}."


def training_lines(run: dict[str, Any], state: dict[str, Any], judged: Judged, loss: float | None) -> list[str]:
    lines = [f"{state.get('step', 0):,} steps, {state.get('tokens', 0):,} tokens", *validation_lines(run, state, judged)]
    if loss is not None:
        lines.append(f"training loss at the last logged step {loss:.4f}")
    if versions := _object(run, "versions"):
        lines.append("made with " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if run.get("git_commit"):
        lines.append(f"code at commit {run['git_commit']}")
    if command := _list(run, "command"):
        lines.append(f"command: `{shlex.join(without_folders(str(word)) for word in redact(command))}`")
    return lines


def validation_lines(run: dict[str, Any], state: dict[str, Any], judged: Judged) -> list[str]:
    """This checkpoint's loss with all that repeats it, and the run's best up to then where that is another step's."""
    step, best, lines = state.get("step", 0), state.get("best_loss"), []
    if (mine := judged.get(step)) is not None:
        bits = mine.get("val_bits_per_byte")
        per_byte = f", {bits:.4f} bits per byte" if _is_number(bits) else ""
        lines.append(f"validation loss {mine['val_loss']:.4f} nats a token{per_byte}{_judged_on(run, state)}")
    if _is_number(best) and (mine is None or mine["val_loss"] != best):
        of_rows = [number for number, row in judged.items() if row["val_loss"] == best]  # an older version did not write the step
        at_step = state.get("best_step") or (of_rows[0] if len(of_rows) == 1 else None)
        at = f" at step {_number(at_step)}" if at_step else ""
        lines.append(f"best validation loss of the run up to here {best:.4f} nats a token{at}")
    return lines


def _judged_on(run: dict[str, Any], state: dict[str, Any]) -> str:
    """The split's first samples: as many as the checkpoint says, or as launch/run/assemble.py takes for an older one's run."""
    about = _object(run, "validation")
    batches, batch = _object(run, "arguments").get("eval_batches"), run.get("global_batch")
    samples, length = about.get("samples"), about.get("sequence_length")
    if not all(isinstance(count, int) for count in (batches, batch, samples, length)):
        return ""
    judged = _object(_object(state, "extra"), "judged_on").get("samples")
    if not isinstance(judged, int):
        judged = min(batches * batch, samples)  # type: ignore[operator]
    return f", on the validation split's first {judged:,} samples of {length:,} tokens"


def logged(checkpoint: Path, state: dict[str, Any]) -> tuple[Judged, float | None]:
    """Of the run's metrics up to the checkpoint's step: evaluations, and the last training loss. Half a row is passed over."""
    judged, loss = Judged(), None
    path = run_of(checkpoint) / "metrics.jsonl"
    if not path.is_file():  # a pipe would be waited for
        return judged, loss
    # The card tells what there is to tell, and no export ends for it. Line by line: a long run's are many gigabytes, most of them
    # the experts' load.
    with suppress(OSError), path.open("rb") as file:
        for row in (parse(line) for line in file if b'loss"' in line):
            if row is None or row["step"] > state.get("step", 0):
                continue
            if _is_number(row.get("val_loss")):
                judged[row["step"]] = row
            if _is_number(row.get("loss")):
                loss = row["loss"]
    return judged, loss


def data_lines(run: dict[str, Any]) -> list[str]:
    """Where the shards' folders are still there, their manifests say how many documents, under which licenses."""
    sources = _object(run, "sources")
    names = [without_folders(str(name)) for name in _list(sources, "sources")]
    counts = zip(names, _list(sources, "tokens"), strict=False)
    lines = [f"{name}: {_number(count)} tokens" for name, count in counts] or ["not recorded"]
    if sources.get("fingerprint"):
        lines.append(f"fingerprint {sources['fingerprint']}")
    for folder, manifest in shard_manifests(run):
        arguments = _object(manifest, "arguments")
        kept = ", ".join(map(str, _list(arguments, "licenses"))) or "any, or unknown"
        count = sum(_object(_object(manifest, "splits"), split).get("documents", 0) for split in _object(manifest, "splits"))
        cut = f"fill-in-the-middle rate {arguments.get('fim_rate', 0)}"
        lines.append(f"{without_folders(folder)}: {count:,} documents, licenses kept: {kept}, {cut}")
    return lines


def shard_manifests(run: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(folder, manifest) of the run's data, where it still lies where it was trained from."""
    folders = [str(folder) for folder in _list(_object(run, "sources"), "sources")]
    read = [(folder, read_object(Path(folder) / MANIFEST, LISTING_BYTES)) for folder in folders]
    return [(folder, manifest) for folder, manifest in read if manifest]


def fim_rate(checkpoint: Path) -> float | None:
    """The highest share of documents that the run saw cut for filling in; None where its shards are gone."""
    manifests = shard_manifests(read_object(run_of(checkpoint) / "config.json"))
    rates = [float(_object(manifest, "arguments").get("fim_rate") or 0.0) for _, manifest in manifests]
    return max(rates) if rates else None


def intended(rate: float | None) -> str:
    """`rate`: of `fim_rate`. A tokenizer has the tokens for filling in whether the model has seen them or not."""
    if rate:
        return f"Completing and filling in source code{INTENDED}"
    unseen = (
        "" if rate is None else "\nIt was not trained to fill in: it has never seen the tokens that its tokenizer has for that."
    )
    return f"Completing source code{INTENDED}{unseen}"


def loading(config: Any) -> str:
    from transformers import __version__

    needs = f"transformers 5 from 5.17 on (this folder was written by {__version__})"
    if getattr(config, "attention_sinks", False):
        needs += "; its attention is `eager` alone, since `sdpa` and flash-attention 2 would drop the sinks without a word"
    trust = ", trust_remote_code=True" if config.model_type == "moe_gpt" else ""  # AutoTokenizer would ask as well
    return f'''Needs {needs}.

    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto"{trust})
    tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})
    prompt = tokenizer("def fibonacci(n):", return_tensors="pt")
    set_seed(0)  # generation_config.json samples
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))'''


def without_folders(word: str) -> str:
    """`/home/me/shards:0.5` is `shards:0.5`; what is no absolute path stays."""
    return FOLDERS.sub(r"\1", word.rstrip("/")) or word


def _object(holder: dict[str, Any], name: str) -> dict[str, Any]:
    """Empty where it is missing or something else: what a person edited never stops an export."""
    value = holder.get(name)
    return value if isinstance(value, dict) else {}


def _list(holder: dict[str, Any], name: str) -> list[Any]:
    value = holder.get(name)
    return value if isinstance(value, list) else []


def _number(value: Any) -> str:
    return f"{value:,}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
