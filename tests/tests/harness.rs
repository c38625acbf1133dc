//! The harness itself: what it builds and compares must be trustworthy before
//! anything is judged by it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use sluice_tests::proxy::{Access, Fault, Proxy, Rule};
use sluice_tests::tree::{Times, compare, compare_but, root_time};
use sluice_tests::{Containerd, Registry, Scratch, command, image};

/// containerd's overlayfs unpack, which the other tests take as the truth,
/// against an unpack by umoci, which shares no code with it.
#[test]
fn containerd_unpacks_the_odd_image_as_umoci_does() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let containerd = Containerd::start(&scratch)?;
    let odd = image::odd()?;
    let reference = registry.push(odd.layout(), image::TAG, "odd:1")?;
    containerd.pull(&reference, "overlayfs")?;
    let mounted = containerd.mount(&reference, "overlayfs")?;

    let bundle = scratch.path().join("bundle");
    command::run(
        Command::new("umoci")
            .args(["raw", "unpack", "--image"])
            .arg(format!("{}:{}", odd.layout().display(), image::TAG))
            .arg(&bundle),
    )?;
    let summary = compare_but(&mounted, &bundle, Times::Nanoseconds, |path, what| {
        // Overlayfs gives merged directories one link; containerd leaves out
        // trusted attributes, umoci empty ones.
        root_time(path, what)
            || (what == "links" && !path.starts_with("links"))
            || (what == "extended attributes"
                && ["xattrs/link", "xattrs/trusted", "xattrs/user"]
                    .iter()
                    .any(|name| path == Path::new(name)))
    })?;
    assert!(summary.entries > 300, "{summary:?}");
    assert!(summary.links >= 6, "{summary:?}");
    assert!(summary.xattrs > 50, "{summary:?}");
    containerd.unmount(&mounted)?;
    Ok(())
}

#[test]
fn the_comparison_sees_every_difference() -> Result<()> {
    let scratch = Scratch::new()?;
    let (left, right) = (scratch.dir("left")?, scratch.dir("right")?);
    let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let make = |root: &Path| -> Result<()> {
        for name in ["content", "mode", "owner", "time", "xattr", "longer"] {
            fs::write(root.join(name), "the same")?;
        }
        symlink("target", root.join("link"))?;
        fs::write(root.join("first"), "two names")?;
        fs::hard_link(root.join("first"), root.join("second"))?;
        fs::write(root.join("third"), "two names")?;
        fs::hard_link(root.join("third"), root.join("fourth"))?;
        for entry in fs::read_dir(root)? {
            let path = entry?.path();
            if !path.is_symlink() {
                fs::File::open(path)?.set_modified(then)?;
            }
        }
        command::run(
            Command::new("touch")
                .args(["-h", "-d", "@5"])
                .arg(root.join("link")),
        )?;
        fs::File::open(root)?.set_modified(then)?;
        Ok(())
    };
    make(&left)?;
    make(&right)?;
    compare(&left, &right, Times::Nanoseconds)?;

    fs::write(right.join("content"), "the sAme")?;
    fs::write(right.join("longer"), "the same and more")?;
    std::os::unix::fs::chown(right.join("owner"), Some(9), None)?;
    fs::set_permissions(right.join("owner"), fs::Permissions::from_mode(0o4644))?;
    let later = then + Duration::from_nanos(1);
    fs::File::open(right.join("time"))?.set_modified(later)?;
    rustix::fs::setxattr(
        right.join("xattr"),
        "user.x",
        b"y",
        rustix::fs::XattrFlags::empty(),
    )?;
    fs::remove_file(right.join("link"))?;
    symlink("other", right.join("link"))?;
    // Same counts, other pairs.
    fs::remove_file(right.join("second"))?;
    fs::remove_file(right.join("fourth"))?;
    fs::hard_link(right.join("first"), right.join("fourth"))?;
    fs::hard_link(right.join("third"), right.join("second"))?;
    fs::write(right.join("additional"), "")?;
    fs::remove_file(right.join("mode"))?;

    let text = compare(&left, &right, Times::Nanoseconds)
        .unwrap_err()
        .to_string();
    for difference in [
        "/content: content: expected 0x61 at 5, is 0x41 at 5",
        "/longer: size",
        "/longer: content: expected the end at 8",
        "/owner: owner: expected 0, is 9",
        "/owner: mode: expected \"644\", is \"4644\"",
        "/time: modification time",
        "/xattr: extended attributes",
        "/link: target",
        "is the same file as",
        "/additional: name: expected nothing, is there",
        "/mode: name: expected it, is missing",
    ] {
        assert!(text.contains(difference), "{difference} is not in\n{text}");
    }
    Ok(())
}

#[test]
fn the_proxy_breaks_what_it_is_told_and_counts() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let odd = image::odd()?;
    registry.push(odd.layout(), image::TAG, "odd:1")?;
    let manifest = image::read_manifest(odd.layout())?;
    let layer = &manifest.layers[0];
    let path = format!("/v2/odd/blobs/{}", layer.digest);
    let blob = fs::read(registry.blob_file(&layer.digest.to_string()))?;
    assert_eq!(blob.len() as u64, layer.size);
    let proxy = Proxy::start(registry.host())?;

    let (head, body) = get(&proxy, &path, Some("bytes=100-199"))?;
    assert!(head.starts_with("HTTP/1.1 206"), "{head}");
    assert_eq!(body, blob[100..200]);

    proxy.fail("/blobs/", 1, Fault::Tamper(150));
    let (_, body) = get(&proxy, &path, Some("bytes=100-199"))?;
    let mut tampered = blob[100..200].to_vec();
    tampered[50] ^= 0xff;
    assert_eq!(body, tampered);

    proxy.fail("/blobs/", 1, Fault::IgnoreRange);
    let (head, body) = get(&proxy, &path, Some("bytes=100-199"))?;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert_eq!(body.len(), blob.len());

    proxy.fail("/blobs/", 1, Fault::Truncate(10));
    let (head, body) = get(&proxy, &path, None)?;
    assert!(
        head.contains(&format!("content-length: {}", blob.len())),
        "{head}"
    );
    assert_eq!(body, blob[..10]);

    proxy.fail_ranges("/blobs/", 1, Fault::Status(429, "Retry-After: 1\r\n"));
    let (head, _) = get(&proxy, &path, None)?;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let (head, body) = get(&proxy, &path, Some("bytes=0-0"))?;
    assert!(
        head.starts_with("HTTP/1.1 429") && head.contains("Retry-After: 1"),
        "{head}"
    );
    assert!(body.is_empty());

    assert_eq!(proxy.requests("/blobs/"), 6);
    assert_eq!(proxy.bytes("/blobs/"), 100 + 100 + 2 * layer.size + 10);
    Ok(())
}

#[test]
fn the_proxy_dies_redirects_and_asks_for_credentials() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let odd = image::odd()?;
    registry.push(odd.layout(), image::TAG, "odd:1")?;
    let config = image::read_manifest(odd.layout())?.config.digest;
    let path = &format!("/v2/odd/blobs/{config}");
    let (proxy, other) = (
        Proxy::start(registry.host())?,
        Proxy::start(registry.host())?,
    );
    let status = |proxy: &Proxy| -> Result<String> {
        let (head, _) = get(proxy, path, None)?;
        Ok(head.split(' ').nth(1).unwrap_or_default().to_owned())
    };

    proxy.fail("/blobs/", 1, Fault::Reset(5));
    let broken = get(&proxy, path, None).expect_err("a reset");
    ensure!(format!("{broken:#}").contains("reset"), "{broken:#}");

    let redirect = Fault::Redirect {
        to: other.host(),
        query: "signature=1".to_owned(),
    };
    proxy.schedule(Rule::new(redirect).after(1).times(1));
    assert_eq!(status(&proxy)?, "200");
    let (head, _) = get(&proxy, path, None)?;
    let target = format!("Location: http://{}{path}?signature=1", other.host());
    ensure!(
        head.starts_with("HTTP/1.1 307") && head.contains(&target),
        "{head}"
    );

    proxy.demand(Access::Password("YTpi".to_owned()));
    let (head, _) = get(&proxy, path, None)?;
    ensure!(head.contains("WWW-Authenticate: Basic"), "{head}");
    proxy.demand(Access::Token);
    assert_eq!(status(&proxy)?, "401");
    let (_, body) = get(&proxy, "/token?scope=x", None)?;
    assert_eq!(
        body,
        br#"{"token":"tokens-are-numbered-0","expires_in":86400}"#
    );
    proxy.demand(Access::Open);

    proxy.down();
    ensure!(TcpStream::connect(proxy.host()).is_err());
    proxy.up()?;
    assert_eq!(status(&proxy)?, "200");
    let struck = proxy.struck();
    assert_eq!((struck["reset connection"], struck["redirect"]), (1, 1));
    Ok(())
}

/// One request on a connection of its own: head and body.
fn get(proxy: &Proxy, path: &str, range: Option<&str>) -> Result<(String, Vec<u8>)> {
    let mut stream = TcpStream::connect(proxy.host())?;
    let range = range.map_or_else(String::new, |range| format!("Range: {range}\r\n"));
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n{range}\r\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let end = bytes
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .context("no head")?
        + 4;
    let body = bytes.split_off(end);
    Ok((String::from_utf8(bytes)?, body))
}
