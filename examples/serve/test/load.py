"""Many clients at once, of any server that speaks OpenAI's API: speed, waiting times, memory, and whether texts depend on company.

    load.py URL [--clients 16] [--seconds 60] [--tokens 64] [--words 60] [--text FILE] [--pid PID] [--check]

Each client asks for one text after the other, as a stream. With --check every text is asked for once more alone, afterwards, and
must be the same. With --pid the memory of that process is told, at the beginning and at the end. One JSON object comes out.
"""
import argparse
import http.client
import json
import random
import threading
import time
import urllib.parse

WORDS = ("the king had a daughter who was beautiful beyond all measure and when she went into the forest an old woman came and "
         "said where are you going my child and what is in the basket on your arm").split()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--words", type=int, default=60, help="of each prompt")
    parser.add_argument("--different", type=int, default=40, help="prompts that differ")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--text", help="file to take prompts from")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--check", action="store_true")
    return parser.parse_args()


def prompts(args):
    words, chance = WORDS, random.Random(1)
    if args.text:
        with open(args.text, encoding="utf-8", errors="replace") as file:
            words = file.read().split()
        starts = [chance.randrange(max(1, len(words) - args.words)) for _ in range(args.different)]
        return [" ".join(words[start:start + args.words]) for start in starts]
    return [" ".join(chance.choices(words, k=args.words)) for _ in range(args.different)]


def ask(args, prompt, seed):
    """The text, its tokens, when the first came, and the gaps between them; in seconds."""
    url = urllib.parse.urlparse(args.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=600)
    body = {"prompt": prompt, "max_tokens": args.tokens, "seed": seed, "temperature": args.temperature, "stream": True,
            "stream_options": {"include_usage": True}}
    started = last = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read()[:300]}")
    text, tokens, first, gaps = "", 0, None, []
    for line in response:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        piece = json.loads(line[6:])
        if "error" in piece:
            raise RuntimeError(piece["error"])
        tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
        if not piece["choices"] or not piece["choices"][0]["text"]:
            continue
        now = time.monotonic()
        if first is None:
            first = now - started
        else:
            gaps.append(now - last)
        last = now
        text += piece["choices"][0]["text"]
    connection.close()
    return text, tokens, first, gaps


def share(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else None


def resident(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def main():
    args = arguments()
    all_prompts, done, lock, wrong, memory = prompts(args), [], threading.Lock(), [], []
    end = time.monotonic() + args.seconds

    def client(number):
        chance = random.Random(number)
        while time.monotonic() < end and not wrong:
            which = chance.randrange(len(all_prompts))
            try:
                answer = ask(args, all_prompts[which], which)
            except Exception as error:  # one that fails is what this is to find
                wrong.append(repr(error))
                return
            with lock:
                done.append((which, answer))

    started = time.monotonic()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(args.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if args.pid:
            memory.append(resident(args.pid))
        time.sleep(min(1, args.seconds / 20))
    seconds = time.monotonic() - started
    differ = 0
    if args.check:
        alone = {which: ask(args, all_prompts[which], which)[0] for which in {which for which, _ in done}}
        differ = sum(answer[0] != alone[which] for which, answer in done)
    firsts = [answer[2] for _, answer in done if answer[2] is not None]
    gaps = [gap for _, answer in done for gap in answer[3]]
    tokens = sum(answer[1] for _, answer in done)
    print(json.dumps({
        "clients": args.clients, "texts": len(done), "tokens": tokens, "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 2),
        "first_token_s": {"p50": share(firsts, .5), "p95": share(firsts, .95), "p99": share(firsts, .99)},
        "gap_s": {"p50": share(gaps, .5), "p95": share(gaps, .95), "p99": share(gaps, .99), "most": max(gaps, default=None)},
        "resident_bytes": {"after_a_tenth": memory[len(memory) // 10], "end": memory[-1], "most": max(memory)} if memory else None,
        "texts_that_depend_on_company": differ if args.check else None, "errors": wrong,
    }))
    if wrong or differ:
        raise SystemExit(1)


main()
