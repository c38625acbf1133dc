use super::*;

async fn look_up(json: &str, host: &str, repository: &str) -> Result<Option<Credentials>, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    std::fs::write(&path, json).unwrap();
    find(&[directory.path().join("missing"), path], host, repository).await
}

fn password(user: &str, password: &str) -> Credentials {
    Credentials::Password {
        user: user.to_owned(),
        password: password.to_owned(),
    }
}

#[tokio::test]
async fn entries_as_docker_and_podman_write_them() {
    // base64 of "me:s3:cret"
    let json = r#"{"auths": {
        "https://index.docker.io/v1/": {"auth": "bWU6czM6Y3JldA=="},
        "http://old.example/v2/": {"username": "u", "password": "p"},
        "quay.io": {"auth": "bWU6czM6Y3JldA=="},
        "quay.io/team": {"username": "team", "password": "p"},
        "azure.io": {"auth": "eA==", "identitytoken": "refresh"},
        "empty.io": {}
    }}"#;
    for (host, repository, expected) in [
        ("docker.io", "library/x", Some(password("me", "s3:cret"))),
        ("old.example", "x", Some(password("u", "p"))),
        ("quay.io", "other/x", Some(password("me", "s3:cret"))),
        ("quay.io", "teammate/x", Some(password("me", "s3:cret"))),
        ("quay.io", "team/x", Some(password("team", "p"))),
        (
            "azure.io",
            "x",
            Some(Credentials::Identity("refresh".to_owned())),
        ),
        ("empty.io", "x", None),
        ("io", "x", None),
    ] {
        assert_eq!(
            look_up(json, host, repository).await,
            Ok(expected),
            "{host}/{repository}"
        );
    }
}

#[tokio::test]
async fn bad_files_are_named_and_not_quoted() {
    let error = look_up(r#"{"auths": {"a.io": {"auth": 17171717}}}"#, "a.io", "x")
        .await
        .unwrap_err();
    assert!(error.contains("config.json: it is not a Docker configuration"));
    assert!(!error.contains("17171717"), "{error}");
    let error = look_up(r#"{"auths": {"a.io": {"auth": "!hunter2"}}}"#, "a.io", "x")
        .await
        .unwrap_err();
    assert!(!error.contains("hunter2"), "{error}");
}

#[tokio::test]
async fn helper_without_a_program_says_which() {
    let json = r#"{"credHelpers": {"a.io": "sluice-test-absent"}}"#;
    let error = look_up(json, "a.io", "x").await.unwrap_err();
    assert!(
        error.contains("docker-credential-sluice-test-absent cannot be run"),
        "{error}"
    );
    let json = r#"{"credsStore": "../../bin/sh"}"#;
    let error = look_up(json, "a.io", "x").await.unwrap_err();
    assert!(error.contains("no name of a helper"), "{error}");
}

#[test]
fn debug_shows_no_secret() {
    let shown = format!(
        "{:?} {:?} {:?}",
        password("me", "hunter2"),
        Credentials::Identity("hunter2".to_owned()),
        Credentials::Registry("hunter2".to_owned())
    );
    assert!(!shown.contains("hunter2"), "{shown}");
}

#[tokio::test]
async fn helpers_are_asked_for_the_server() {
    use std::os::unix::fs::PermissionsExt;

    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("docker-credential-test");
    let body = r#"#!/bin/sh
read -r server
case "$1 $server" in
  "get a.io") echo '{"ServerURL":"a.io","Username":"me","Secret":"s"}' ;;
  "get t.io") echo '{"ServerURL":"t.io","Username":"<token>","Secret":"r"}' ;;
  "get none.io") echo 'credentials not found in native keychain'; exit 1 ;;
  "get odd.io") echo 'hello' ;;
  *) echo 'locked'; exit 1 ;;
esac
"#;
    std::fs::write(&script, body).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = script.to_str().unwrap();
    let ask = |server: &'static str| async move { ask_helper(program, server).await };
    assert_eq!(ask("a.io").await, Ok(Some(password("me", "s"))));
    assert_eq!(
        ask("t.io").await,
        Ok(Some(Credentials::Identity("r".to_owned())))
    );
    assert_eq!(ask("none.io").await, Ok(None));
    assert!(ask("odd.io").await.unwrap_err().contains("no credentials"));
    assert!(ask("x.io").await.unwrap_err().contains("(locked)"));
}
