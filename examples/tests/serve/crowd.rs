//! Many who want the same: clients share, by their addresses. Linux has all of 127.0.0.0/8.

use super::server::{PATIENCE, Reply, Server, reply, request, rest, tale, wait};
use serde_json::{Value, json};
use std::{
    io::Write,
    net::TcpStream,
    time::{Duration, Instant},
};
use tokio::net::TcpSocket;

const JSON: (&str, &str) = ("Content-Type", "application/json");

/// A connection from 127.0.0.`host`.
fn connect(server: &Server, host: u8) -> TcpStream {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let stream = runtime.block_on(async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, host], 0).into()).unwrap();
        socket.connect(server.address).await.unwrap()
    });
    let stream = stream.into_std().unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn ask(server: &Server, host: u8, headers: &[(&str, &str)], body: &Value) -> TcpStream {
    let mut stream = connect(server, host);
    let headers = [&[JSON], headers].concat();
    stream.write_all(request("POST", "/v1/completions", &headers, &body.to_string()).as_bytes()).unwrap();
    stream
}

fn answer(server: &Server, host: u8, headers: &[(&str, &str)], body: &Value) -> Reply {
    reply(&rest(&mut ask(server, host, headers, body)))
}

fn has_its_share(reply: &Reply, of: &str) {
    assert_eq!((reply.error().0, reply.error().1.as_str()), (429, "rate_limit_exceeded"), "{reply:?}");
    assert!(reply.head.contains("retry-after: 1") && reply.body.contains(of), "{reply:?}");
}

#[test]
fn one_address_cannot_take_all_connections() {
    let server = Server::start(&["--client-share", "0.5", "--max-connections", "9", "--patience", "30"]);
    let start = Instant::now();
    // Five of nine get in: the fifth finds fewer of its own than are free.
    let silent: Vec<_> = (0..20).map(|_| connect(&server, 2)).collect();
    has_its_share(&answer(&server, 2, &[], &tale("The king", 3, 1)), "connections");
    // Others are served at once, and one after the other has some.
    for host in [1, 3, 4] {
        assert_eq!(answer(&server, host, &[], &tale("The king", 3, 1)).status, 200, "{host}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let metrics = server.get("/metrics").body;
    let refused =
        metrics.lines().find_map(|line| line.strip_prefix("candle_sparse_connections_refused_total "));
    assert_eq!(refused, Some("16"), "fifteen silent ones, and the one that asked");
    drop(silent);
    wait("its places are free", || {
        (answer(&server, 2, &[], &tale("The king", 3, 1)).status == 200).then_some(())
    });
}

/// Long texts of one client hold all places and its share of the queue: another one's is written meanwhile.
#[test]
fn who_asks_for_much_waits_behind_itself() {
    let server = Server::slow(&[
        "--threads",
        "1",
        "--max-sequences",
        "2",
        "--max-queued",
        "4",
        "--client-share",
        "0.5",
    ]);
    let wanted = server.text(&tale("The wolf", 5, 1));
    let long = |seed: u64| json!({ "prompt": "The king", "max_tokens": 900, "seed": seed, "temperature": 1.3, "stream": true });
    let waiting = |n: usize| {
        let stats = server.stats();
        (stats["running"] == 2 && stats["waiting"] == n).then_some(())
    };
    let mut greedy = Vec::new();
    for seed in 0..4 {
        greedy.push(ask(&server, 2, &[], &long(seed)));
        if seed >= 1 {
            wait("it runs or waits", || waiting(seed as usize - 1));
        }
    }
    has_its_share(&answer(&server, 2, &[], &tale("The king", 3, 1)), "wait");
    let text = answer(&server, 1, &[], &tale("The wolf", 5, 1)).json()["choices"][0]["text"].clone();
    assert_eq!(text, wanted);
    assert_eq!(server.stats()["waiting"], 2, "it had its place before those that came earlier");
    // The one that stood still goes on.
    for stream in &mut greedy[..2] {
        assert!(rest(stream).contains("data: [DONE]"));
    }
}

/// Who shares an address with a greedy client is served, if each has a key of its own.
#[test]
fn each_of_several_keys_is_a_client() {
    let args = ["--threads", "1", "--max-sequences", "1", "--max-queued", "4", "--client-share", "0.5"];
    let env = |keys| [("CANDLE_SPARSE_API_KEY", keys), ("CANDLE_SPARSE_LEVEL", "scalar")];
    let long = |seed: u64| json!({ "prompt": "The king", "max_tokens": 900, "seed": seed, "temperature": 1.3, "stream": true });
    let [anna, bert] = [[("Authorization", "Bearer anna")], [("Authorization", "Bearer bert")]];
    for (keys, apart) in [("anna,bert", true), ("anna", false)] {
        let server = Server::with_env(&args, &env(keys));
        let other = if apart { &bert } else { &anna };
        let held = |running: usize, waiting: usize| {
            let stats = server.request("GET", "/stats", &anna, "").json();
            (stats["running"] == running && stats["waiting"] == waiting).then_some(())
        };
        let mut greedy = Vec::new();
        for seed in 0..3 {
            greedy.push(ask(&server, 1, &anna, &long(seed)));
            wait("it runs or waits", || held(1, seed as usize));
        }
        has_its_share(&answer(&server, 1, &anna, &tale("The king", 3, 1)), "wait");
        let reply = answer(&server, 1, other, &tale("The wolf", 5, 1));
        if apart {
            assert_eq!(reply.status, 200, "{reply:?}");
            wait("its turn came before the last that had asked earlier, which begins now", || held(1, 0));
        } else {
            has_its_share(&reply, "wait");
        }
    }
}

#[test]
fn a_proxy_names_whom_it_asks_for() {
    let long =
        json!({ "prompt": "The king", "max_tokens": 900, "seed": 1, "temperature": 1.3, "stream": true });
    let of = |name: &'static str| [("X-Forwarded-For", name)];
    for trusted in [true, false] {
        let args = ["--threads", "1", "--max-sequences", "1", "--max-queued", "2", "--proxy", "127.0.0.9"];
        let server = Server::slow(&args);
        let proxy = if trusted { 9 } else { 8 };
        let begin = |number: usize| {
            let stream = ask(&server, proxy, &of("10.0.0.1"), &long);
            wait("it runs or waits", || {
                let stats = server.stats();
                (stats["running"] == 1 && stats["waiting"] == number).then_some(stream.try_clone().unwrap())
            })
        };
        let _greedy = [begin(0), begin(1)];
        has_its_share(&answer(&server, proxy, &of("10.0.0.2, 10.0.0.1"), &long), "wait");
        let other = ask(&server, proxy, &of("10.0.0.1, 10.0.0.2"), &long);
        if trusted {
            wait("it waits", || (server.stats()["waiting"] == 2).then_some(()));
        } else {
            has_its_share(&reply(&rest(&mut other.try_clone().unwrap())), "wait");
        }
    }
}

/// Long bodies that do not come hold no others up.
#[test]
fn one_address_cannot_take_all_long_bodies() {
    let server = Server::start(&["--client-share", "0.5", "--patience", "5"]);
    let body = json!({ "prompt": vec![5; 20_000], "max_tokens": 2 });
    let whole = request("POST", "/v1/completions", &[JSON], &body.to_string());
    let half: Vec<_> = (0..6)
        .map(|_| {
            let mut stream = connect(&server, 2);
            stream.write_all(&whole.as_bytes()[..whole.len() / 2]).unwrap();
            stream
        })
        .collect();
    let start = Instant::now();
    // Too long for the model, but it was read.
    assert_eq!(answer(&server, 1, &[], &body).error().1, "context_length_exceeded");
    assert_eq!(answer(&server, 2, &[], &tale("The king", 3, 1)).status, 200, "a short one");
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    // Four have a place, and are told that they are too slow; two have waited for one as long, and have their turn then.
    let said: Vec<_> = half.into_iter().map(|mut stream| reply(&rest(&mut stream)).status).collect();
    assert_eq!(
        said.iter().filter(|status| **status == 408).count() + said.iter().filter(|s| **s == 429).count(),
        6
    );
    assert!(said.iter().filter(|status| **status == 408).count() >= 4, "{said:?}");
}

/// A text that is far too long is refused by its beginning: it takes 200 times its bytes while it becomes tokens.
#[test]
fn what_is_far_too_long_takes_no_memory() {
    let server = Server::start(&["--client-share", "0.5", "--max-body", "8"]);
    server.text(&tale("The king", 3, 1));
    let before = server.resident_bytes();
    for _ in 0..3 {
        let reply = server.post("/v1/completions", &json!({ "prompt": "a ".repeat(3_500_000) }));
        assert_eq!((reply.error().0, reply.error().1.as_str()), (400, "context_length_exceeded"));
    }
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 100_000_000, "{grown} bytes more");
}
