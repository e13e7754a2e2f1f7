"""Native results in llama.cpp, which nobody here wrote: does it compute what we say they compute?

    python benchmarks/foreign_client.py runs/reap_demo --converter llama.cpp/convert_hf_to_gguf.py \
        --client venv/bin/python

Each model directory is converted to GGUF by llama.cpp's own converter (which wants `sentencepiece`
beside torch, transformers and numpy) and served by its server, here the one of
`pip install xllamacpp` in the environment whose python `--client` names; `--server URL` asks one
that runs already, started with the GGUF. On windows of held-out text, the first token of each not
predicted, three readers give the log-probabilities of the whole vocabulary at every position:

- *transformers*, in a process that never imports mctk;
- *mctk*, streamed, a layer in memory at a time;
- *llama.cpp*, with keys and values in the cache in float32 and without flash attention.

Printed are their perplexities, llama.cpp's KL divergence from transformers (mean over positions, in
nats) with the largest difference of a log-probability that matters (above -10) and the share of
positions with the same most likely token; how many of the text's tokens llama.cpp's tokenizer
gives alike; and how many tokens of a greedy continuation agree, of --greedy, from half a window on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "recipes/demo/text/test"
MATTERS = -10.0
"""Log-probabilities below it are compared by the divergence alone."""
AT_ONCE = 32
"""Prompts of a request: the answer to each is a line for every token of the vocabulary."""


@dataclass
class Reading:
    """What one reader makes of the windows.

    Attributes:
        logs: Log-probabilities of the next token, float32 [N, L - 1, V].
        greedy: Tokens that follow the first half of each window, [N, G]; of some readers none.
    """

    logs: Any
    greedy: Any = None


def by_mctk(model: Path, ids: Any) -> Reading:
    """Reads the windows [N, L] by a streamed forward in float32."""
    import torch
    from mctk.checkpoint import Source
    from mctk.sweep import StreamedModel, stream_logits

    streamed = StreamedModel(Source(model), dtype="float32")
    chunks = [logits[:, :-1].log_softmax(-1) for logits in stream_logits(streamed, ids)]
    return Reading(torch.cat(chunks))


def by_transformers(model: Path, ids: Any, greedy: int) -> Reading:
    """Reads the windows in a process without mctk."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.save(ids, f"{folder}/ids.pt")
        command = [sys.executable, __file__, "--role", "plain", str(model), folder, str(greedy)]
        subprocess.run(command, check=True)
        return Reading(torch.load(f"{folder}/logs.pt"), torch.load(f"{folder}/greedy.pt"))


def plain(model: str, folder: str, greedy: str) -> None:
    """The process without mctk: writes log-probabilities and continuations to the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.load(f"{folder}/ids.pt")
    with torch.no_grad():
        logs = [loaded(row[None]).logits[0, :-1].log_softmax(-1) for row in ids]
        begin = ids[:, : ids.shape[1] // 2]
        tokens = loaded.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            max_new_tokens=int(greedy),
            min_new_tokens=int(greedy),
            do_sample=False,
        )
    torch.save(torch.stack(logs), f"{folder}/logs.pt")
    torch.save(tokens[:, begin.shape[1] :], f"{folder}/greedy.pt")
    assert "mctk" not in sys.modules


class LlamaServer:
    """Asks a server of llama.cpp.

    Args:
        address: Its URL.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request."""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, without special ones."""
        found: list[int] = self.post("/tokenize", content=text, add_special=False)["tokens"]
        return found

    def logs(self, prompts: list[list[int]], vocabulary: int) -> Any:
        """Log-probabilities of what follows each prompt, [P, V].

        Of a prompt that begins like the one before, the server has that part in its cache.
        """
        import torch

        answers = self.post(
            "/completion",
            prompt=prompts,
            n_predict=1,
            n_probs=vocabulary,
            temperature=0.0,
            cache_prompt=True,
            # An answer that is the end, or half a character, comes without probabilities: it is
            # made to be a letter. They are the model's all the same.
            logit_bias=[[self.tokens("a")[0], 1e4]],
        )
        found = torch.full((len(prompts), vocabulary), -torch.inf)
        for row, answer in zip(found, answers, strict=True):
            top = answer["completion_probabilities"][0]["top_logprobs"]
            row[[entry["id"] for entry in top]] = torch.tensor([entry["logprob"] for entry in top])
        return found

    def read(self, ids: Any, vocabulary: int, greedy: int) -> Reading:
        """Reads windows [N, L], a prompt for every position."""
        import torch

        logs, continued = [], []
        for row in ids.tolist():
            prompts = [row[:end] for end in range(1, len(row))]
            chunks = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]
            logs.append(torch.cat([self.logs(chunk, vocabulary) for chunk in chunks]))
            answer = self.post(
                "/completion",
                prompt=row[: len(row) // 2],
                n_predict=greedy,
                temperature=0.0,
                return_tokens=True,
                ignore_eos=True,
            )
            continued.append(answer["tokens"])
        return Reading(torch.stack(logs), torch.tensor(continued))


def serve(gguf: str, length: str, threads: str) -> None:
    """The client's process: says its address and serves until its standard input ends."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = gguf
    parameters.n_ctx = int(length)
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 1  # errors
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = off
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


@contextlib.contextmanager
def served(client: str, gguf: Path, length: int, threads: int) -> Iterator[LlamaServer]:
    """A server of the model, ended afterwards."""
    command = [client, __file__, "--role", "serve", str(gguf), str(length), str(threads)]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            process.wait()
            log.seek(0)
            raise SystemExit(f"{gguf}: llama.cpp does not load it:\n{log.read()[-2000:]}")
        yield LlamaServer(address)
        process.stdin.close()


def convert(converter: str, pre: str, *arguments: str) -> None:
    """The converter's process: llama.cpp's own, told of a pre-tokenizer that it does not know.

    It knows pre-tokenizers by a hash of what they make of a fixed text, which depends on the
    vocabulary too: one that was trained anew is known to it only by being told.
    """
    sys.path.insert(0, str(Path(converter).resolve().parent))
    from conversion.base import TextModel

    own = TextModel.get_vocab_base_pre

    def told(self: Any, tokenizer: Any) -> str:
        try:
            return own(self, tokenizer)
        except NotImplementedError:
            return pre

    TextModel.get_vocab_base_pre = told
    import convert_hf_to_gguf

    sys.argv = [converter, *arguments]
    convert_hf_to_gguf.main()


def windows(model: Path, length: int, count: int) -> tuple[dict[str, str], Any]:
    """The demo's held-out texts, and of each the first windows, [texts * count, length]."""
    import torch
    from mctk.data import Source, evaluation_windows
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts, ids = {}, []
    for file in sorted(TEXTS.glob("*.jsonl")):
        cut = evaluation_windows(tokenizer, Source(text=str(file)), length, limit=count)
        ids.append(torch.as_tensor(cut.ids))
        texts[file.stem] = tokenizer.decode(ids[-1].flatten().tolist())
    return texts, torch.cat(ids)


def compare(
    readings: dict[str, Reading], ids: Any, texts: dict[str, str], count: int
) -> list[dict[str, Any]]:
    """One row of figures a text, and one for all."""
    rows = []
    for number, name in enumerate([*texts, "all"]):
        part = slice(None) if name == "all" else slice(number * count, (number + 1) * count)
        target = ids[part, 1:, None]
        row: dict[str, Any] = {"text": name}
        for reader, reading in readings.items():
            losses = -reading.logs[part].gather(-1, target).double()
            row[f"perplexity {reader}"] = float(losses.mean().exp())
        ours, theirs = (
            readings[key].logs[part].double().log_softmax(-1)  # they come rounded
            for key in ("transformers", "llama.cpp")
        )
        row["KL divergence"] = float((ours.exp() * (ours - theirs)).sum(-1).mean())
        row["largest difference"] = float((ours - theirs).abs()[ours > MATTERS].max())
        row["same top token"] = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
        first, second = (readings[key].greedy[part] for key in ("transformers", "llama.cpp"))
        agree = (first == second).long().cumprod(-1).sum(-1)
        row["greedy tokens alike"] = [int(n) for n in agree]
        rows.append(row)
    return rows


def measure(model: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one model directory."""
    import torch
    from transformers import AutoTokenizer

    config = json.loads((model / "config.json").read_text())
    if "quantization_config" in config:
        raise SystemExit(f"{model}: is in mctk's own format, which llama.cpp does not read")
    texts, ids = windows(model, options.length, options.windows)
    readings = {
        "transformers": by_transformers(model, ids, options.greedy),
        "mctk": by_mctk(model, ids),
    }
    vocabulary = readings["mctk"].logs.shape[-1]
    with contextlib.ExitStack() as stack:
        if options.server:
            server = LlamaServer(options.server)
        else:
            gguf = folder / f"{model.name}.gguf"
            command = [options.python, __file__, "--role", "convert", options.converter]
            command += [options.pre, str(model), "--outtype", options.type, "--outfile", str(gguf)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{model}: the converter failed:\n{done.stderr[-2000:]}")
            length = options.length + options.greedy
            server = stack.enter_context(served(options.client, gguf, length, options.threads))
        readings["llama.cpp"] = server.read(ids, vocabulary, options.greedy)
        tokenizer = AutoTokenizer.from_pretrained(model)
        alike = {
            name: tokenizer.encode(text, add_special_tokens=False) == server.tokens(text)
            for name, text in texts.items()
        }
    rows = compare(readings, ids, texts, options.windows)
    assert torch.isfinite(readings["llama.cpp"].logs).all(), "a token without a probability"
    return {"model": str(model), "tokenizer alike": alike, "rows": rows}


def show(found: dict[str, Any]) -> None:
    """Prints a model's figures as a Markdown table."""
    alike = found["tokenizer alike"]
    print(f"\n{found['model']}: tokens alike in {sum(alike.values())} of {len(alike)} texts\n")
    print("| text | transformers | mctk | llama.cpp | KL | largest | same top | greedy |")
    print("|---|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        figures = [f"{row[f'perplexity {r}']:.4f}" for r in ("transformers", "mctk", "llama.cpp")]
        figures += [f"{row['KL divergence']:.1e}", f"{row['largest difference']:.1e}"]
        figures += [f"{row['same top token']:.4f}", ", ".join(map(str, row["greedy tokens alike"]))]
        print(f"| {' | '.join([row['text'], *figures])} |", flush=True)


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--role"]:
        role, *arguments = sys.argv[2:]
        {"plain": plain, "serve": serve, "convert": convert}[role](*arguments)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="model directories")
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--python", default=sys.executable, help="the converter's python")
    parser.add_argument("--pre", default="gpt-2", help="pre-tokenizer, where it knows none")
    parser.add_argument("--type", default="f32", help="the converter's --outtype")
    parser.add_argument("--client", help="a python with xllamacpp")
    parser.add_argument("--server", help="URL of a server that runs already")
    parser.add_argument("--threads", type=int, default=1, help="threads of llama.cpp")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=1, help="windows of each text")
    parser.add_argument("--greedy", type=int, default=32, help="tokens to continue by")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    if not options.server and not (options.converter and options.client):
        parser.error("give --converter and --client, or --server")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            found.append(measure(model, options, Path(folder)))
            show(found[-1])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
