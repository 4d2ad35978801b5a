//! Settings from environment variables, and several processes at once.

use core::time::Duration;
use std::fs;
use std::process::{Child, Command, Stdio};

use candle_sparse_models::hub::{HubRepo, HubSettings};
use tempfile::TempDir;

use crate::server::{Hub, Server};
use crate::{ID, TOKEN, assert_clean, bounded, tiny, weights};

/// Not a test of its own: what the tests below run as a separate process.
#[test]
fn child() {
    if std::env::var("HUB_TEST_CHILD").is_ok() {
        let repo = HubRepo::new(&HubSettings::from_env(), ID, None).unwrap();
        let place = repo.get("model.safetensors").map_or_else(|e| e.to_string(), |p| p.display().to_string());
        eprintln!("child: {place}");
    }
}

fn spawn(environment: &[(&str, &str)]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "environment::child", "--nocapture"]).env("HUB_TEST_CHILD", "1");
    for (name, _) in std::env::vars() {
        let ours = ["HF_", "HUGGING", "XDG_", "TRANSFORMERS_"].iter().any(|start| name.starts_with(start));
        if ours || name.to_lowercase().ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    command.envs(environment.iter().copied());
    command.stderr(Stdio::piped()).stdout(Stdio::null());
    command.spawn().unwrap()
}

fn said(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn processes_share_one_download() {
    bounded(|| {
        let cache = TempDir::new().unwrap();
        let hub = tiny();
        let server = Server::start(move |request| {
            std::thread::sleep(Duration::from_millis(100));
            hub.answer(request)
        });
        let folder = cache.path().to_str().unwrap();
        let environment = [("HF_ENDPOINT", server.url.as_str()), ("HF_HUB_CACHE", folder)];
        let children = [(), (), ()].map(|()| spawn(&environment));
        for text in children.map(said) {
            assert!(text.contains("child: ") && text.contains("snapshots"), "{text}");
            // The standard error is no terminal here, so no bar may be drawn.
            assert!(!text.contains('%') && !text.contains("B/s"), "{text}");
        }
        assert_eq!(server.downloads("model.safetensors"), 1);
        assert_clean(&cache, &[&weights()]);
    });
}

#[test]
fn the_environment_is_read() {
    bounded(|| {
        let home = TempDir::new().unwrap();
        let server = Hub { token: Some(TOKEN), ..tiny() }.serve();
        let folder = home.path().to_str().unwrap();
        // A slash at the end of the endpoint is common and means nothing.
        let endpoint = format!("{}/", server.url);
        let base = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", folder)];
        let run = |more: &[(&str, &str)]| said(spawn(&[&base, more].concat()));
        assert!(run(&[]).contains("set HF_TOKEN"));
        assert!(run(&[("HF_TOKEN", TOKEN), ("HF_HUB_OFFLINE", "1")]).contains("forbids a download"));

        let cached = home.path().join("hub/models--org--tiny/snapshots");
        let text = run(&[("HF_TOKEN", TOKEN), ("HF_HUB_OFFLINE", "0")]);
        assert!(text.contains(cached.to_str().unwrap()), "{text}");
        assert!(run(&[("HF_HUB_OFFLINE", "1")]).contains(cached.to_str().unwrap()));

        fs::remove_dir_all(home.path().join("hub")).unwrap();
        fs::write(home.path().join("token"), format!("{TOKEN}\n")).unwrap();
        assert!(run(&[]).contains(cached.to_str().unwrap()), "the token file of `hf auth login`");
        let other = home.path().join("other");
        fs::rename(home.path().join("token"), &other).unwrap();
        let elsewhere = home.path().join("elsewhere");
        let text =
            run(&[("HF_TOKEN_PATH", other.to_str().unwrap()), ("HF_HUB_CACHE", elsewhere.to_str().unwrap())]);
        assert!(text.contains(elsewhere.to_str().unwrap()), "{text}");
    });
}

#[test]
fn paths_and_switches_are_read_as_in_python() {
    bounded(|| {
        let home = TempDir::new().unwrap();
        let server = Hub { token: Some(TOKEN), ..tiny() }.serve();
        fs::write(home.path().join("tok"), format!(" {TOKEN}\n\n")).unwrap();
        let base = [("HF_ENDPOINT", server.url.as_str()), ("HOME", home.path().to_str().unwrap())];
        let run = |more: &[(&str, &str)]| said(spawn(&[&base, more].concat()));
        for (variables, folder) in [
            (&[("HF_HOME", "~/hf"), ("HF_TOKEN_PATH", "~/tok")][..], "hf/hub"),
            (&[("HF_HUB_CACHE", "$HOME/cache"), ("HF_TOKEN_PATH", "${HOME}/tok")], "cache"),
            (&[("HUGGINGFACE_HUB_CACHE", "~/old"), ("HF_TOKEN", TOKEN)], "old"),
            (&[("XDG_CACHE_HOME", "~/xdg"), ("HUGGING_FACE_HUB_TOKEN", TOKEN)], "xdg/huggingface/hub"),
            (&[("HF_HOME", " "), ("HF_HUB_CACHE", ""), ("HF_TOKEN", TOKEN)], ".cache/huggingface/hub"),
        ] {
            let text = run(variables);
            let snapshots = home.path().join(folder).join("models--org--tiny/snapshots");
            assert!(text.contains(snapshots.to_str().unwrap()), "{variables:?}: {text}");
            fs::remove_dir_all(home.path().join(folder)).unwrap();
        }
        let kept = run(&[("HF_TOKEN", TOKEN), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "YES")]);
        assert!(kept.contains("401"), "{kept}");
        for offline in ["TRANSFORMERS_OFFLINE", "HF_HUB_OFFLINE"] {
            let asked = server.requests().len();
            assert!(run(&[(offline, "on")]).contains("forbids a download"));
            assert_eq!(server.requests().len(), asked);
        }
        assert!(run(&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")]).contains("401"));
    });
}
