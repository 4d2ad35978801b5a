"""Two hundred clients that do everything wrong, and one beside them that wants to be answered.

    abuse.py URL [--clients 200] [--from 4] [--seconds 60] [--wait 30] [--patience 5] [--pid PID] [--mb 300]

The rude ones send half requests and bodies without end, never read, never speak, go away, ask for what multiplies. They come from so
many addresses of this machine as --from says, 127.0.0.2 and those that follow; with --from 0 from that of the ordinary one. It
asks for a short text again and again; told that there is no place for it, it asks again, as OpenAI's client does. It must be answered
within --wait seconds each time. With --pid the process may grow by --mb megabytes, and --patience (what the server was given as
--patience) and --wait seconds after the end it must have given back its files. One JSON object comes out.
"""
import argparse
import http.client
import json
import os
import random
import socket
import struct
import threading
import time
import urllib.parse

PATH = "/v1/completions"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--from", type=int, default=4, dest="addresses")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--wait", type=float, default=30)
    parser.add_argument("--patience", type=float, default=30)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--mb", type=float, default=300)
    return parser.parse_args()


def post(body, length=None, more=""):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = len(body) if length is None else length
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}Content-Length: {length}\r\n\r\n"
    return head.encode() + body


LONG = {"prompt": "The king", "max_tokens": 900, "stream": True, "n": 2, "temperature": 1.3, "logprobs": 5}


def reads(connection, seconds):
    """Until it is closed, for so long at most."""
    end = time.monotonic() + seconds
    connection.settimeout(seconds)
    while connection.recv(65536) and time.monotonic() < end:
        pass


def silent(connection, chance):
    reads(connection, 60)


def half_head(connection, chance):
    whole = post(LONG)
    connection.sendall(whole[:chance.randrange(1, 60)])
    reads(connection, 60)


def drops(connection, chance):
    """A byte of the head now and then."""
    for byte in post(LONG)[:80]:
        connection.sendall(bytes([byte]))
        time.sleep(0.5)


def half_body(connection, chance):
    connection.sendall(post(b'{"prompt": "The', 500))
    reads(connection, 60)


def huge_body(connection, chance):
    connection.sendall(post(b"", 1 << 40))
    for _ in range(2000):
        connection.sendall(b"[" * 65536)


def endless_chunks(connection, chance):
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.sendall(head.encode())
    for _ in range(2000):
        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def endless_head(connection, chance):
    connection.sendall(b"GET / HTTP/1.1\r\n")
    for _ in range(20000):
        connection.sendall(b"X-Y: " + b"z" * 500 + b"\r\n")


def noise(connection, chance):
    connection.sendall(chance.randbytes(chance.randrange(1, 5000)))
    reads(connection, 10)


def deaf(connection, chance):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.sendall(post(LONG))
    time.sleep(20)


def gone(connection, chance):
    connection.sendall(post(LONG))
    time.sleep(chance.random())


def reset(connection, chance):
    connection.sendall(post(LONG)[:chance.randrange(100, 200)])
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def multiplies(connection, chance):
    body = [{"prompt": ["a"] * 100_000, "n": 16}, {"prompt": "a " * 500_000}, {"prompt": [5] * 400_000},
            {"prompt": "a", "stop": ["x" * 100_000] * 16}]
    connection.sendall(post(chance.choice(body)))
    reads(connection, 60)


def many_at_once(connection, chance):
    connection.sendall(post({"prompt": "The king", "max_tokens": 20}) * 50)
    reads(connection, 20)


def deep(connection, chance):
    connection.sendall(post(b'{"prompt":' * 100_000))
    reads(connection, 60)


RUDE = [silent, half_head, drops, half_body, huge_body, endless_chunks, endless_head, noise, deaf, gone, reset, multiplies,
        many_at_once, deep]


def rude(address, number, addresses, end, counts):
    chance = random.Random(number)
    source = (f"127.0.0.{2 + number % addresses}", 0) if addresses else None
    while time.monotonic() < end:
        kind = RUDE[(number + chance.randrange(3)) % len(RUDE)]
        try:
            with socket.create_connection(address, 60, source) as connection:
                counts[kind.__name__] = counts.get(kind.__name__, 0) + 1
                kind(connection, chance)
        except OSError:  # it was shown the door
            time.sleep(0.05)


def ordinary(address, wait):
    """Seconds until a text was there, and how often it was refused before."""
    body, refused, started = {"prompt": "The wolf", "max_tokens": 8, "seed": 1, "temperature": 0.5}, 0, time.monotonic()
    while True:
        connection, again = http.client.HTTPConnection(*address, timeout=wait), 1
        try:
            connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            said, status, again = response.read(), response.status, float(response.headers.get("Retry-After", 1))
        except ConnectionError:  # of an address that has its share not all are told so
            status = 429
        connection.close()
        if status == 200:
            return json.loads(said)["choices"][0]["text"], time.monotonic() - started, refused
        if status not in (429, 503):
            raise RuntimeError(f"{status}: {said[:300]}")
        if time.monotonic() - started > wait:
            raise RuntimeError(f"refused {refused} times in {wait} s")
        refused += 1
        time.sleep(again)


def resident(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def main():
    args = arguments()
    url = urllib.parse.urlparse(args.url)
    address = (url.hostname, url.port)
    wanted, _, _ = ordinary(address, args.wait)
    before = (resident(args.pid), files(args.pid)) if args.pid else (0, 0)
    end, counts, wrong, waits, refused, most = time.monotonic() + args.seconds, {}, [], [], 0, [0, 0]
    threads = [threading.Thread(target=rude, args=(address, number, args.addresses, end, counts), daemon=True) for number in range(args.clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end and not wrong:
        try:
            text, took, times = ordinary(address, args.wait)
            waits.append(took)
            refused += times
            if text != wanted:
                wrong.append(f"'{text}' is another text than '{wanted}'")
            if took > args.wait:
                wrong.append(f"an ordinary client waited {took:.1f} s")
        except Exception as error:  # a server that is down is what this is to find
            wrong.append(repr(error))
        if args.pid:
            most = [max(most[0], resident(args.pid)), max(most[1], files(args.pid))]
        time.sleep(0.2)
    for thread in threads:
        thread.join(90)
    # What was asked for by those that are gone now may have to be written first.
    given_back, left = time.monotonic() + args.patience + args.wait, 0
    while args.pid and (left := files(args.pid)) > before[1] + 2 and time.monotonic() < given_back:
        time.sleep(0.2)
    if args.pid and most[0] - before[0] > args.mb * 1e6:
        wrong.append(f"{(most[0] - before[0]) / 1e6:.0f} MB more memory")
    if args.pid and left > before[1] + 2:
        wrong.append(f"{left} files are open, {before[1]} were before")
    waits.sort()
    print(json.dumps({
        "clients": args.clients, "addresses": args.addresses, "seconds": args.seconds, "rude": dict(sorted(counts.items())), "rude_connections": sum(counts.values()),
        "ordinary": {"answers": len(waits), "refused": refused, "p50_s": waits[len(waits) // 2] if waits else None,
                     "most_s": waits[-1] if waits else None},
        "resident_bytes": {"before": before[0], "most": most[0]}, "files": {"before": before[1], "most": most[1], "after": left},
        "errors": wrong,
    }))
    if wrong:
        raise SystemExit(1)


main()
