//! What a user is told when a download fails, and what is left of it: nothing.

use core::time::Duration;
use std::fs;

use candle_core::Error;
use candle_sparse_models::files::ModelFiles;
use candle_sparse_models::hub::{HubRepo, HubSettings};
use tempfile::TempDir;

use crate::server::{Hub, Reply, Request, Server, etag};
use crate::{ID, assert_clean, assert_says, bounded, repo, settings, tiny, weights};

#[test]
fn missing_and_bad_shards_are_named() {
    bounded(|| {
        for (shard, needle) in [
            ("model-9.safetensors", "`model-9.safetensors` of model `org/tiny`"),
            ("../model.safetensors", "`../model.safetensors` is not the name"),
        ] {
            let cache = TempDir::new().unwrap();
            let index = format!(r#"{{"weight_map":{{"a":"{shard}"}}}}"#);
            let server = Hub::default()
                .with("main/config.json", b"{}")
                .with("main/tokenizer.json", b"{}")
                .with("main/model.safetensors.index.json", index.as_bytes())
                .serve();
            let error = ModelFiles::resolve(ID, None, &settings(&server, &cache)).unwrap_err();
            assert_says(&error, &[needle]);
        }
    });
}

#[test]
fn no_weights_lists_what_was_looked_for() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server =
            Hub::default().with("main/config.json", b"{}").with("main/tokenizer.json", b"{}").serve();
        let error = ModelFiles::resolve(ID, None, &settings(&server, &cache)).unwrap_err();
        assert_says(&error, &[ID, "`model.safetensors`", "`model.safetensors.index.json`"]);
    });
}

#[test]
fn what_is_unknown_is_named_and_leaves_no_trace() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = tiny().serve();
        let settings = settings(&server, &cache);
        let error = ModelFiles::resolve("org/other", Some("v9"), &settings).unwrap_err();
        assert_says(&error, &["`config.json`", "`org/other`", "`v9`", &server.url, "404"]);

        let asked = server.requests().len();
        let error = ModelFiles::resolve("tales-slu", None, &settings).unwrap_err();
        assert_says(&error, &["`tales-slu`", "no folder", "org/name"]);
        assert_eq!(server.requests().len(), asked, "a name without a slash is none of the Hub");
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    });
}

#[test]
fn a_server_that_is_down_is_named() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = tiny().serve();
        let repo = repo(&server, &cache);
        let url = server.url.clone();
        drop(server);
        let error = repo.get("config.json").unwrap_err();
        assert_says(&error, &["cannot reach", ID, &url, "HF_HUB_OFFLINE"]);
        assert!(repo.get_optional("config.json").is_err());
        assert_clean(&cache, &[]);
    });
}

#[test]
fn a_server_in_trouble_is_quoted() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = Server::start(|_| Reply::new(503, b""));
        let error = repo(&server, &cache).get_optional("config.json").unwrap_err();
        assert_says(&error, &["503", ID, &server.url, "try again"]);
    });
}

#[test]
fn a_server_that_is_no_hub_is_recognised() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let portal = Server::start(|_| Reply::new(200, b"<html>please log in</html>"));
        let error = repo(&portal, &cache).get("config.json").unwrap_err();
        assert_says(&error, &["does not answer as the Hub", &portal.url]);

        for (etag, commit) in [("../../../evil", "c"), ("e", "../../evil"), ("/evil", "c")] {
            let bad = Server::start(move |request| {
                Reply::range(request, b"content").header("ETag", etag).header("X-Repo-Commit", commit)
            });
            let error = repo(&bad, &cache).get("config.json").unwrap_err();
            assert_says(&error, &["evil", "server's answer"]);
        }
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0);
    });
}

/// Downloads from a server whose answers `spoil` damages, then from a good one.
fn assert_recovers(needles: &[&str], spoil: fn(&Request, Reply) -> Reply) {
    let cache = TempDir::new().unwrap();
    let config = tiny().files["main/config.json"].clone();
    let hub = tiny();
    let bad = Server::start(move |request| {
        let reply = hub.answer(request);
        let spoils = request.wants_body() && request.path.ends_with("/model.safetensors");
        if spoils { spoil(request, reply) } else { reply }
    });
    let url = bad.url.clone();
    let spoilt = repo(&bad, &cache);
    // On a cache without the model, and on one that has some of its files.
    for _state in ["empty", "with a file"] {
        let error = spoilt.get("model.safetensors").unwrap_err();
        assert_says(&error, needles);
        assert_says(&error, &["`model.safetensors`", ID, "`main`", &url]);
        assert_clean(&cache, &[&config]);
        spoilt.get("config.json").unwrap();
    }
    let good = tiny().serve();
    let path = repo(&good, &cache).get("model.safetensors").unwrap();
    assert_eq!(fs::read(path).unwrap(), weights());
    assert_clean(&cache, &[&config, &weights()]);
}

#[test]
fn a_connection_cut_again_and_again_leaves_nothing() {
    bounded(|| {
        assert_recovers(&["broke off", "run it again"], |_, reply| Reply {
            cut: Some(reply.body.len() / 2),
            ..reply
        });
    });
}

#[test]
fn a_body_shorter_than_announced_leaves_nothing() {
    bounded(|| {
        assert_recovers(&["120000 bytes", "announced 200000"], |_, mut reply| {
            reply.body.truncate(120_000);
            reply
        });
    });
}

#[test]
fn a_body_longer_than_announced_leaves_nothing() {
    bounded(|| {
        assert_recovers(&["200003 bytes", "announced 200000"], |_, mut reply| {
            reply.body.extend(b"end");
            reply
        });
    });
}

#[test]
fn a_server_that_resumes_at_the_wrong_place_leaves_nothing() {
    bounded(|| {
        assert_recovers(&["broke off", "run it again"], |request, reply| match request.header("range") {
            None => Reply { cut: Some(50_000), ..reply },
            Some(_) => Reply::new(206, &weights()[10..]).header("Content-Range", "bytes 10-199999/200000"),
        });
    });
}

#[test]
fn a_file_that_changes_meanwhile_leaves_nothing() {
    bounded(|| {
        assert_recovers(&["changed on the Hub", "run it again"], |_, mut reply| {
            reply.headers.retain(|(name, _)| *name != "X-Repo-Commit");
            reply.header("X-Repo-Commit", "other")
        });
    });
}

#[test]
fn redirects_that_lead_nowhere_are_named() {
    bounded(|| {
        for (location, needle) in [
            (None, "302"),
            (Some("/org/tiny/resolve/main/config.json"), "more than 10 times"),
            (Some("ftp://example.org/x"), "ftp://"),
            (Some("http://"), "cannot be followed"),
        ] {
            let cache = TempDir::new().unwrap();
            let server = Server::start(move |_| match location {
                Some(location) => Reply::new(302, b"").header("Location", location),
                None => Reply::new(302, b""),
            });
            assert_says(&repo(&server, &cache).get("config.json").unwrap_err(), &[needle, ID, "HF_ENDPOINT"]);
            assert_clean(&cache, &[]);
        }
    });
}

#[test]
fn a_server_that_is_silent_is_given_up() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = Server::start(|_| {
            std::thread::sleep(Duration::from_secs(5));
            Reply::new(200, b"")
        });
        let settings = settings(&server, &cache).with_timeout(Duration::from_millis(100));
        let start = std::time::Instant::now();
        let error = HubRepo::new(&settings, ID, None).unwrap().get("config.json").unwrap_err();
        assert_says(&error, &["cannot reach the server", "timeout"]);
        assert!(start.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn a_failed_download_can_be_told_from_others() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = Server::start(|_| Reply::new(429, b""));
        let error = repo(&server, &cache).get("config.json").unwrap_err();
        assert_says(&error, &["429", "wait", "HF_TOKEN"]);
        assert!(matches!(candle_sparse::Error::of(&error), Some(candle_sparse::Error::Download { .. })));
        let broken = HubSettings::default().with_endpoint(Some("huggingface.co".into()));
        let error = HubRepo::new(&broken, ID, None).unwrap_err();
        assert_says(&error, &["HF_ENDPOINT", "`huggingface.co` is no address", "https://"]);
        let missing = std::path::Path::new("/proc/none/cache").to_path_buf();
        let unwritable = settings(&tiny().serve(), &cache).with_cache_dir(Some(missing));
        let server = tiny().serve();
        let unwritable = unwritable.with_endpoint(Some(server.url.clone()));
        let error = HubRepo::new(&unwritable, ID, None).unwrap().get("config.json").unwrap_err();
        assert_says(&error, &["/proc/none/cache", "cannot be written", "HF_HUB_CACHE"]);
    });
}

#[test]
fn a_server_error_on_the_content_leaves_nothing() {
    bounded(|| {
        assert_recovers(&["500"], |_, _| Reply::new(500, b""));
    });
}

#[test]
fn what_a_killed_process_left_is_cleared() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let blobs = "models--org--tiny/.candle-sparse/models--org--tiny/blobs";
        let etag = etag(&weights()).replace('"', "");
        let left = cache.path().join(blobs).join(format!("{etag}.part"));
        fs::create_dir_all(left.parent().unwrap()).unwrap();
        fs::write(&left, b"half").unwrap();
        let server = tiny().serve();
        let path = repo(&server, &cache).get("model.safetensors").unwrap();
        assert_eq!(fs::read(path).unwrap(), weights(), "hf-hub would resume what was left");
        assert_clean(&cache, &[&weights()]);
    });
}

#[test]
fn bad_ids_revisions_and_names_are_refused_without_a_request() {
    let settings = HubSettings::default();
    let long = "x".repeat(97);
    for id in [
        "",
        "/",
        "org/",
        "/name",
        "a/b/c",
        "..",
        "../x",
        "org/..",
        "https://huggingface.co/org/name",
        "name",
        "org/na me",
        "org/name?x",
        "a--b",
        ".hidden",
        "org/name-",
        "org\\name",
        &long,
    ] {
        let error = HubRepo::new(&settings, id, None).unwrap_err();
        assert_says(&error, &["is not a model id", "org/name"]);
    }
    for revision in ["", "..", "a/../b", "/x", "x/", "a b", "x?y", "x%2e", "x\n"] {
        let error = HubRepo::new(&settings, ID, Some(revision)).unwrap_err();
        assert_says(&Error::Msg(error.to_string().replace('\n', "")), &["is not a valid revision"]);
    }
    let repo = HubRepo::new(&settings, ID, None).unwrap();
    for file in ["", "../x", "/etc/passwd", "a//b", "a?b"] {
        assert_says(&repo.get(file).unwrap_err(), &["is not a valid file name"]);
        assert_says(&repo.get_optional(file).unwrap_err(), &["is not a valid file name"]);
    }
}
