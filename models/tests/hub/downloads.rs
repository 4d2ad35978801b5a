//! What comes from a Hub that works.

use core::sync::atomic::{AtomicUsize, Ordering};
use core::time::Duration;
use std::fs;
use std::path::PathBuf;

use candle_sparse_models::files::{ModelFiles, Weights};
use candle_sparse_models::hub::HubRepo;
use tempfile::TempDir;

use crate::server::{Hub, Reply, Request, Server, etag};
use crate::{ID, TOKEN, assert_clean, assert_says, bounded, content, repo, settings, tiny, weights};

fn paths(files: &ModelFiles) -> &[PathBuf] {
    match &files.weights {
        Weights::Files(paths) => paths,
        _ => panic!("no safetensors files"),
    }
}

#[test]
fn single_file_then_from_the_cache_without_a_server() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = tiny().with("main/generation_config.json", b"{\"g\":1}").serve();
        let settings = settings(&server, &cache);
        let first = ModelFiles::resolve(ID, None, &settings).unwrap();
        assert_eq!(first.name, ID);
        assert_eq!(first.config.as_deref(), Some(&br#"{"model_type":"llama"}"#[..]));
        assert_eq!(first.generation_config.as_deref(), Some(&b"{\"g\":1}"[..]));
        assert_eq!(first.tokenizer_config, None);
        assert_eq!(first.sparse_profile, None);
        assert_eq!(paths(&first).len(), 1);
        assert_eq!(fs::read(&paths(&first)[0]).unwrap(), weights());
        assert!(server.requests().iter().all(|r| r.header("authorization").is_none()));

        let before = server.requests().len();
        let second = ModelFiles::resolve(ID, None, &settings).unwrap();
        assert_eq!(server.requests().len(), before, "all is cached, even what is missing");
        drop(server);
        let third = ModelFiles::resolve(ID, None, &settings).unwrap();
        assert_eq!(paths(&second), paths(&first));
        assert_eq!(paths(&third), paths(&first));
    });
}

#[test]
fn shards_come_once_each_in_order() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let (one, two) = (content(1, 70_000), content(2, 90_000));
        let index = br#"{"weight_map":{"z":"model-00001-of-00002.safetensors",
            "a":"model-00002-of-00002.safetensors","b":"model-00001-of-00002.safetensors"}}"#;
        let server = Hub::default()
            .with("main/config.json", b"{}")
            .with("main/tokenizer.json", b"{}")
            .with("main/model.safetensors.index.json", index)
            .with("main/model-00001-of-00002.safetensors", &one)
            .with("main/model-00002-of-00002.safetensors", &two)
            .serve();
        let files = ModelFiles::resolve(ID, None, &settings(&server, &cache)).unwrap();
        let got: Vec<_> = paths(&files).iter().map(|path| fs::read(path).unwrap()).collect();
        assert_eq!(got, [one, two]);
        assert_eq!(server.downloads("model-00001-of-00002.safetensors"), 1);
    });
}

#[test]
fn the_revision_is_asked_for() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = tiny().with("v1.0/config.json", b"old").serve();
        let old = HubRepo::new(&settings(&server, &cache), ID, Some("v1.0")).unwrap();
        assert_eq!(fs::read(old.get("config.json").unwrap()).unwrap(), b"old");
        assert!(server.requests().iter().all(|r| r.path == "/org/tiny/resolve/v1.0/config.json"));
        let new = repo(&server, &cache).get("config.json").unwrap();
        assert_eq!(fs::read(new).unwrap(), br#"{"model_type":"llama"}"#);
        assert_eq!(fs::read(old.get("config.json").unwrap()).unwrap(), b"old");

        let asked = server.requests().len();
        let pull_request = HubRepo::new(&settings(&server, &cache), ID, Some("refs/pr/5")).unwrap();
        assert_says(&pull_request.get("config.json").unwrap_err(), &["`refs/pr/5`"]);
        let path = server.requests()[asked].path.clone();
        assert_eq!(path, "/org/tiny/resolve/refs%2Fpr%2F5/config.json");
    });
}

#[test]
fn a_commit_that_python_cached_needs_no_ref() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let snapshot = cache.path().join("models--org--tiny/snapshots/0123abcd");
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join("config.json"), b"{}").unwrap();
        let server = tiny().serve();
        let repo = HubRepo::new(&settings(&server, &cache), ID, Some("0123abcd")).unwrap();
        assert_eq!(repo.get("config.json").unwrap(), snapshot.join("config.json"));
        assert_eq!(server.requests().len(), 0);
    });
}

#[test]
fn a_relative_redirect_is_followed() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = Hub { redirect: Some("/cdn".into()), ..tiny() }.serve();
        let path = repo(&server, &cache).get("model.safetensors").unwrap();
        assert_eq!(fs::read(path).unwrap(), weights());
        assert_clean(&cache, &[&weights()]);
    });
}

#[test]
fn a_redirect_to_another_host_is_followed() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let cdn = tiny().serve();
        let redirect = Some(format!("{}/cdn", cdn.url.replace("127.0.0.1", "localhost")));
        let server = Hub { redirect, token: Some(TOKEN), ..tiny() }.serve();
        let settings = settings(&server, &cache).with_token(Some(TOKEN.into()));
        let repo = HubRepo::new(&settings, ID, None).unwrap();
        let path = repo.get("model.safetensors").unwrap();
        assert_eq!(fs::read(path).unwrap(), weights());
        assert_eq!(cdn.downloads("model.safetensors"), 1);
        assert!(
            cdn.requests().iter().all(|r| r.header("authorization").is_none()),
            "the token is for the endpoint alone"
        );
    });
}

#[test]
fn a_host_that_a_mirror_sends_to_never_sees_the_token() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let hub = tiny().serve();
        // A mirror that announces nothing itself.
        let elsewhere = hub.url.replace("127.0.0.1", "localhost");
        let mirror = Server::start(move |request| {
            Reply::new(307, b"").header("location", format!("{elsewhere}{}", request.path))
        });
        let settings = settings(&mirror, &cache).with_token(Some(TOKEN.into()));
        let path = HubRepo::new(&settings, ID, None).unwrap().get("model.safetensors").unwrap();
        assert_eq!(fs::read(path).unwrap(), weights());
        assert!(mirror.requests().iter().all(|r| r.header("authorization").is_some()));
        assert!(hub.requests().iter().all(|r| r.header("authorization").is_none()));
    });
}

/// Downloads from a Hub whose answers `change` makes poorer, and gives the file's path in the cache.
fn from_poorer(redirect: Option<&str>, change: fn(&Request, Reply) -> Reply) -> (TempDir, PathBuf) {
    let cache = TempDir::new().unwrap();
    let hub = Hub { redirect: redirect.map(String::from), ..tiny() };
    let server = Server::start(move |request| {
        let reply = hub.answer(request);
        change(request, reply)
    });
    let path = repo(&server, &cache).get("model.safetensors").unwrap();
    assert_eq!(fs::read(&path).unwrap(), weights());
    assert_clean(&cache, &[&weights()]);
    (cache, path)
}

fn without(mut reply: Reply, name: &str) -> Reply {
    reply.headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
    reply
}

#[test]
fn what_a_mirror_need_not_say_is_not_needed() {
    bounded(|| {
        from_poorer(None, |_, reply| Reply { chunked: true, ..reply });
        from_poorer(Some("/cdn"), |_, reply| without(reply, "X-Linked-Size"));
        from_poorer(Some("/cdn"), |_, reply| without(without(reply, "X-Linked-Etag"), "X-Linked-Size"));
        from_poorer(
            None,
            |request, reply| if request.method == "HEAD" { Reply::new(405, b"") } else { reply },
        );
        from_poorer(Some("/cdn"), |request, reply| {
            // An address that is signed for GET.
            let refused = request.method == "HEAD" && request.path.starts_with("/cdn");
            if refused { Reply::new(403, b"") } else { without(reply, "X-Linked-Etag") }
        });
        let (_cache, path) = from_poorer(None, |_, mut reply| {
            for (name, value) in &mut reply.headers {
                if *name == "ETag" {
                    *value = format!("W/{value}");
                }
                *name = match *name {
                    "ETag" => "etag",
                    "X-Repo-Commit" => "x-repo-commit",
                    other => other,
                };
            }
            reply
        });
        let blob = etag(&weights()).replace('"', "");
        assert!(fs::canonicalize(path).unwrap().ends_with(format!("blobs/{blob}")));
        // Without a tag there is no name for the content: the file itself stands in the snapshot.
        for tag in ["", "\"\"", "\"a:b;gz\""] {
            let cache = TempDir::new().unwrap();
            let server =
                Server::start(move |request| without(tiny().answer(request), "ETag").header("ETag", tag));
            let path = repo(&server, &cache).get("model.safetensors").unwrap();
            assert!(!path.is_symlink() && fs::read(path).unwrap() == weights());
        }
        let (_cache, path) = from_poorer(None, |_, reply| without(reply, "ETag"));
        assert!(!path.is_symlink());
        // A tag that is another on every answer.
        from_poorer(None, |request, reply| {
            let tag = format!("\"{}\"", request.method);
            without(reply, "ETag").header("ETag", tag)
        });
    });
}

#[test]
fn a_commit_needs_no_server_that_names_it() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let hub = tiny().with(&format!("{commit}/config.json"), b"{}");
        let server = Server::start(move |request| without(hub.answer(request), "X-Repo-Commit"));
        let repo = HubRepo::new(&settings(&server, &cache), ID, Some(commit)).unwrap();
        let path = repo.get("config.json").unwrap();
        assert!(path.parent().unwrap().ends_with(commit));
    });
}

#[test]
fn the_token_opens_a_private_model() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = Hub { token: Some(TOKEN), ..tiny() }.serve();
        let error = repo(&server, &cache).get("config.json").unwrap_err();
        assert_says(&error, &["401", ID, "`main`", &server.url, "set HF_TOKEN"]);

        let wrong = settings(&server, &cache).with_token(Some("hf_other".into()));
        let error = HubRepo::new(&wrong, ID, None).unwrap().get("config.json").unwrap_err();
        assert_says(&error, &["401", "this HF_TOKEN may not read it"]);
        assert!(!error.to_string().contains("hf_other") && !format!("{wrong:?}").contains("hf_"));
        assert_clean(&cache, &[]);

        let asked = server.requests().len();
        let right = settings(&server, &cache).with_token(Some(TOKEN.into()));
        HubRepo::new(&right, ID, None).unwrap().get("config.json").unwrap();
        let bearer = format!("Bearer {TOKEN}");
        let requests = &server.requests()[asked..];
        assert!(requests.iter().all(|r| r.header("authorization") == Some(&bearer)));
    });
}

#[test]
fn a_missing_optional_file_is_asked_for_once() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = tiny().serve();
        let repo = repo(&server, &cache);
        repo.get("config.json").unwrap();
        assert_eq!(repo.get_optional("sparse.safetensors").unwrap(), None);
        let before = server.requests().len();
        assert_eq!(repo.get_optional("sparse.safetensors").unwrap(), None);
        assert_eq!(server.requests().len(), before);
        let marker = "models--org--tiny/.no_exist/commit-of-main/sparse.safetensors";
        assert!(cache.path().join(marker).exists());
    });
}

#[test]
fn a_cut_connection_is_resumed() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let hub = tiny();
        let cuts = AtomicUsize::new(0);
        let server = Server::start(move |request| {
            let mut reply = hub.answer(request);
            if request.wants_body() && cuts.fetch_add(1, Ordering::SeqCst) < 2 {
                reply.cut = Some(reply.body.len() / 2);
            }
            reply
        });
        let path = repo(&server, &cache).get("model.safetensors").unwrap();
        assert_eq!(fs::read(path).unwrap(), weights());
        assert_clean(&cache, &[&weights()]);
        let requests = server.requests();
        let ranges: Vec<_> = requests.iter().filter_map(|r| r.header("range")).collect();
        assert_eq!(ranges, ["bytes=100000-", "bytes=150000-"]);
    });
}

#[test]
fn a_server_that_sends_all_again_is_believed() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let hub = tiny();
        let server = Server::start(move |request| {
            let reply = hub.answer(request);
            match request.header("range") {
                // To a range it answers with the whole.
                Some(_) => Reply { status: 200, body: weights(), ..without(reply, "Content-Range") },
                None if request.wants_body() => Reply { cut: Some(50_000), ..reply },
                None => reply,
            }
        });
        let path = repo(&server, &cache).get("model.safetensors").unwrap();
        assert_eq!(fs::read(path).unwrap(), weights());
        assert_clean(&cache, &[&weights()]);
    });
}

#[test]
fn threads_share_one_download() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let hub = tiny();
        let server = Server::start(move |request| {
            std::thread::sleep(Duration::from_millis(50));
            hub.answer(request)
        });
        std::thread::scope(|scope| {
            for _thread in 0_u8..4 {
                scope.spawn(|| {
                    let path = repo(&server, &cache).get("model.safetensors").unwrap();
                    assert_eq!(fs::read(path).unwrap(), weights());
                });
            }
        });
        assert_eq!(server.downloads("model.safetensors"), 1);
        assert_clean(&cache, &[&weights()]);
    });
}

#[test]
fn offline_uses_the_cache_only() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = tiny().serve();
        let offline = settings(&server, &cache).with_offline(true);
        let error = ModelFiles::resolve(ID, None, &offline).unwrap_err();
        assert_says(&error, &["`config.json`", ID, "HF_HUB_OFFLINE", "not in the cache folder"]);
        assert!(!error.to_string().contains("http"), "{error}");
        assert_eq!(server.requests().len(), 0);

        let repo = repo(&server, &cache);
        for file in ["config.json", "tokenizer.json", "model.safetensors"] {
            repo.get(file).unwrap();
        }
        let asked = server.requests().len();
        let files = ModelFiles::resolve(ID, None, &offline).unwrap();
        assert_eq!(files.generation_config, None);
        assert_eq!(server.requests().len(), asked);
    });
}

#[test]
fn content_that_another_revision_brought_is_reused() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = tiny().with("v2/sub/model.safetensors", &weights()).serve();
        let first = repo(&server, &cache).get("model.safetensors").unwrap();
        let v2 = HubRepo::new(&settings(&server, &cache), ID, Some("v2")).unwrap();
        let second = v2.get("sub/model.safetensors").unwrap();
        assert_ne!(first, second);
        assert_eq!(fs::read(&second).unwrap(), weights());
        assert_eq!(server.downloads("model.safetensors"), 1);
        assert_eq!(v2.get("sub/model.safetensors").unwrap(), second);
        assert_clean(&cache, &[&weights()]);
    });
}

#[test]
fn a_branch_that_moved_does_not_mix_two_commits() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let old = tiny().with("main/config.json", b"old").serve();
        repo(&old, &cache).get("config.json").unwrap();
        let new = Hub { change: "-2", ..tiny() }.with("main/config.json", b"new").serve();
        let files = ModelFiles::resolve(ID, None, &settings(&new, &cache)).unwrap();
        assert_eq!(files.config.as_deref(), Some(&b"new"[..]));
        assert_eq!(paths(&files)[0].parent(), files.folder.as_deref());
        assert_eq!(new.downloads("model.safetensors"), 1);
    });
}

#[test]
fn one_gguf_file_of_a_repository() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let server = Hub::default().with("main/model.Q4_0.gguf", b"GGUF").serve();
        let settings = settings(&server, &cache);
        let files = ModelFiles::resolve(&format!("{ID}/model.Q4_0.gguf"), None, &settings).unwrap();
        assert_eq!(files.name, "model.Q4_0.gguf");
        let Weights::Gguf(path) = &files.weights else { panic!("no GGUF file") };
        assert_eq!(fs::read(path).unwrap(), b"GGUF");
        let missing = ModelFiles::resolve(&format!("{ID}/other.gguf"), None, &settings);
        assert_says(&missing.unwrap_err(), &["other.gguf", ID]);
    });
}
