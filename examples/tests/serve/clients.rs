//! Clients that are rude, slow, gone or too many.

use super::server::{PATIENCE, Server, reply, request, rest, tale, wait};
use serde_json::{Value, json};
use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

const JSON: [(&str, &str); 1] = [("Content-Type", "application/json")];

fn post(body: &Value) -> String {
    request("POST", "/v1/completions", &JSON, &body.to_string())
}

fn is_well(server: &Server) {
    assert_eq!(server.text(&tale("The king", 5, 1)), server.text(&tale("The king", 5, 1)));
}

#[test]
fn whatever_is_sent_the_server_goes_on() {
    let server = Server::start(&[]);
    let whole = post(&tale("The king", 30, 1));
    // Cut anywhere, and the connection closed at once.
    for at in (0..whole.len()).step_by(7) {
        server.connect().write_all(&whole.as_bytes()[..at]).unwrap();
    }
    let endless = format!("GET / HTTP/1.1\r\n{}", "X: y\r\n".repeat(50_000));
    let chunks = "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
    let twice = whole.replace("Content-Length", "Content-Length: 5\r\nContent-Length");
    for bytes in [
        b"".as_slice(),
        b"\r\n\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        &[0xff; 5000],
        endless.as_bytes(),
        chunks.as_bytes(),
        twice.as_bytes(),
    ] {
        let mut stream = server.connect();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    is_well(&server);
    server.wait_idle();
}

#[test]
fn two_requests_on_one_connection_are_answered_in_turn() {
    let server = Server::start(&[]);
    let first = post(&tale("The king", 3, 1)).replace("Connection: close\r\n", "");
    let both = server.raw(format!("{first}{}", post(&tale("The wolf", 3, 1))).as_bytes());
    assert_eq!(both.matches("HTTP/1.1 200 OK").count(), 2, "{both}");
}

/// A text that nobody waits for any more is not written to its end.
#[test]
fn who_goes_away_is_not_written_for() {
    let server = Server::slow(&[]);
    for stream in [false, true] {
        let before = server.wait_idle()["tokens"]["written"].as_u64().unwrap();
        let mut body =
            json!({ "prompt": "The king", "max_tokens": 900, "seed": 5, "stream": stream, "n": 3 });
        body["temperature"] = 1.2.into();
        let mut connection = server.connect();
        connection.write_all(post(&body).as_bytes()).unwrap();
        wait("three texts run", || (server.stats()["running"] == 3).then_some(()));
        if stream {
            connection.read_exact(&mut [0; 500]).unwrap();
        }
        drop(connection);
        let written = server.wait_idle()["tokens"]["written"].as_u64().unwrap() - before;
        assert!(written < 2000, "{written} of 2700 tokens, stream: {stream}");
    }
    is_well(&server);
}

#[test]
fn slow_clients_hold_nobody_up_and_are_dropped() {
    // Here all of them are one client.
    let server = Server::start(&["--patience", "3"]);
    let start = Instant::now();
    let half_head = &b"POST /v1/completions HTTP/1.1\r\nHost: "[..];
    let half_body = post(&tale("The king", 5, 1));
    let half_body = &half_body.as_bytes()[..half_body.len() - 4];
    let slow: Vec<TcpStream> = (0..200)
        .map(|i| {
            let mut stream = server.connect();
            stream.write_all([half_head, half_body, b""][i % 3]).unwrap();
            stream
        })
        .collect();
    is_well(&server);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    for (i, mut stream) in slow.into_iter().enumerate() {
        // A word now and then does not help.
        let _ = stream.write_all(b"x");
        let said = rest(&mut stream);
        if i % 3 == 1 {
            assert_eq!(reply(&said).error().1, "request_timeout");
        } else {
            assert!(
                said.is_empty() || said.starts_with("HTTP/1.1 408") || said.starts_with("HTTP/1.1 400"),
                "{said}"
            );
        }
    }
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    is_well(&server);
}

/// More connections than there are places for: the slow ones make room.
#[test]
fn places_are_free_again_when_patience_ends() {
    let server = Server::start(&["--patience", "1", "--max-connections", "4"]);
    let slow: Vec<_> = (0..12).map(|_| server.connect()).collect();
    is_well(&server);
    drop(slow);
}

/// What it is sent waits where the client does not read, and no text is written for one that never will.
#[test]
fn who_does_not_read_is_dropped() {
    let server = Server::start(&["--patience", "1"]);
    let mut deaf = Vec::new();
    for seed in 0..4 {
        let mut body = json!({ "prompt": "The king", "max_tokens": 800, "seed": seed, "stream": true, "n": 8,
            "logprobs": 5 });
        body["temperature"] = 1.5.into();
        let mut stream = server.connect();
        stream.write_all(post(&body).as_bytes()).unwrap();
        deaf.push(stream);
    }
    is_well(&server);
    server.wait_idle();
    assert!(server.resident_bytes() < 400 << 20, "{}", server.resident_bytes());
}

#[test]
fn more_than_may_wait_is_refused_and_the_rest_is_answered() {
    let server = Server::start(&["--max-sequences", "2", "--max-queued", "2"]);
    let body = json!({ "prompt": "The king", "max_tokens": 60, "seed": 1, "ignored": null });
    let replies: Vec<_> = std::thread::scope(|scope| {
        let ask = |_| scope.spawn(|| server.post("/v1/completions", &body));
        let threads: Vec<_> = (0..24).map(ask).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (answered, refused): (Vec<_>, Vec<_>) = replies.iter().partition(|reply| reply.status == 200);
    assert!(answered.len() >= 2 && !refused.is_empty(), "{replies:?}");
    for reply in &refused {
        assert_eq!((reply.error().0, reply.error().1.as_str()), (503, "overloaded"));
        assert!(reply.head.contains("retry-after: 1"), "{reply:?}");
    }
    let texts: Vec<_> = answered.iter().map(|reply| reply.json()["choices"].clone()).collect();
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    // More than could ever wait.
    let reply = server.post("/v1/completions", &json!({ "prompt": "a", "n": 3 }));
    assert_eq!(reply.error(), (400, "invalid_value".into(), json!("n")));
    assert_eq!(server.wait_idle()["running"], 0);
    is_well(&server);
}

#[test]
#[cfg(unix)]
fn at_the_end_what_runs_is_finished() {
    for signal in ["INT", "TERM"] {
        let mut server = Server::start(&["--threads", "1"]);
        let body =
            json!({ "prompt": "The king", "max_tokens": 700, "seed": 5, "temperature": 1.2, "stream": true });
        let mut connection = server.connect();
        connection.write_all(post(&body).as_bytes()).unwrap();
        connection.read_exact(&mut [0; 300]).unwrap();
        server.signal(signal);
        wait("nobody is let in any more", || refused(&server).then_some(()));
        assert!(rest(&mut connection).contains("data: [DONE]"), "{signal}");
        assert_eq!(server.ended().code(), Some(0), "{signal}");
    }
}

#[cfg(unix)]
fn refused(server: &Server) -> bool {
    TcpStream::connect(server.address).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

#[test]
#[cfg(unix)]
fn what_takes_longer_than_the_grace_is_told_so() {
    let mut server = Server::slow(&["--threads", "1", "--grace", "0"]);
    let body = json!({ "prompt": "The king", "max_tokens": 900, "seed": 5, "temperature": 1.2, "n": 8 });
    let mut connection = server.connect();
    connection.write_all(post(&body).as_bytes()).unwrap();
    wait("it runs", || (server.stats()["running"] == 8).then_some(()));
    let idle = server.connect();
    assert!(server.is_running());
    server.signal("TERM");
    let said = reply(&rest(&mut connection));
    assert_eq!((said.error().0, said.error().1.as_str()), (503, "shutting_down"));
    assert_eq!(server.ended().code(), Some(0));
    drop(idle);
}
