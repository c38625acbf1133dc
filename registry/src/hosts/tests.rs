use std::fs;

use tempfile::TempDir;

use super::*;

fn context() -> Context {
    Context {
        action: "fetch",
        subject: "x".to_owned(),
        host: "x".to_owned(),
    }
}

/// Directories of hosts, in which files can be written.
struct Dirs {
    dirs: Vec<TempDir>,
    hosts: Hosts,
}

impl Dirs {
    fn new(count: usize) -> Self {
        let dirs: Vec<_> = (0..count).map(|_| tempfile::tempdir().unwrap()).collect();
        let config = Config {
            hosts_dirs: dirs.iter().map(|dir| dir.path().to_owned()).collect(),
            ..Config::default()
        };
        Self {
            hosts: Hosts::new(&config).unwrap(),
            dirs,
        }
    }

    fn write(&self, dir: usize, name: &str, text: &str) {
        let path = self.dirs[dir].path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // As an editor does, so that the file is another one.
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(&new, &path).unwrap();
    }

    fn roots(&self, namespace: &str) -> Result<Vec<String>, String> {
        let hosts = self.hosts.of(namespace, &context());
        let root = |host: &Arc<Host>| host.root.to_string();
        match hosts {
            Ok(hosts) => Ok(hosts.iter().map(root).collect()),
            Err(error) => Err(error.to_string()),
        }
    }
}

#[test]
fn the_directory_is_chosen_as_containerd_does() {
    let dirs = Dirs::new(2);
    let server = |name: &str| format!("server = \"https://{name}\"");
    let root = |name: &str| Ok(vec![format!("https://{name}/v2")]);
    assert_eq!(dirs.roots("r.io:5000"), root("r.io:5000"));
    for (dir, name) in [
        (1, "_default"),
        (1, "r.io:5000"),
        (1, "r.io_5000_"),
        (0, "_default"),
        (0, "r.io:5000"),
        (0, "r.io_5000_"),
    ] {
        let host = format!("d{dir}-{}", name.replace([':', '_'], "-"));
        dirs.write(dir, &format!("{name}/hosts.toml"), &server(&host));
        assert_eq!(dirs.roots("r.io:5000"), root(&host), "{dir}/{name}");
    }
    assert_eq!(dirs.roots("other.io"), root("d0--default"));
    // What a hostile reference could make of a name is no path.
    assert_eq!(dirs.roots(".."), root("d0--default"));
}

#[test]
fn changes_are_seen_and_mistakes_change_nothing() {
    let dirs = Dirs::new(1);
    dirs.write(0, "r.io/hosts.toml", "[host.\"http://a\"]");
    let first = dirs.hosts.of("r.io", &context()).unwrap();
    let again = dirs.hosts.of("r.io", &context()).unwrap();
    assert!(Arc::ptr_eq(&first, &again), "read once");
    dirs.write(0, "r.io/hosts.toml", "[host.\"http://b\"]");
    let expected = ["http://b/v2", "https://r.io/v2"].map(str::to_owned);
    assert_eq!(dirs.roots("r.io").unwrap(), expected);
    dirs.write(0, "r.io/hosts.toml", "[host.\"http://c\"]\nca = 1");
    assert_eq!(dirs.roots("r.io").unwrap(), expected);
    // A registry that is new to this process cannot have former hosts.
    dirs.write(0, "s.io/hosts.toml", "\nca = 1");
    let error = dirs.roots("s.io").unwrap_err();
    assert!(
        error.contains("s.io/hosts.toml:2: ca is of type"),
        "{error}"
    );
    fs::remove_dir_all(dirs.dirs[0].path().join("r.io")).unwrap();
    assert_eq!(dirs.roots("r.io").unwrap(), ["https://r.io/v2"]);
}

#[test]
fn certificates_in_the_manner_of_docker_are_for_the_registry_itself() {
    let dirs = Dirs::new(1);
    dirs.write(0, "r.io/a.crt", "no certificate");
    let error = dirs.roots("r.io").unwrap_err();
    assert!(error.contains("a.crt cannot be used"), "{error}");
    dirs.write(0, "s.io/b.cert", "no certificate");
    let error = dirs.roots("s.io").unwrap_err();
    assert!(error.contains("b.cert cannot be used"), "{error}");
    // A file of hosts takes their place.
    dirs.write(0, "r.io/hosts.toml", "server = \"http://r.io\"");
    assert_eq!(dirs.roots("r.io").unwrap(), ["http://r.io/v2"]);
}

#[test]
fn only_stand_ins_are_told_for_whom_they_stand() {
    let dirs = Dirs::new(1);
    let text = "server = \"https://registry-1.docker.io\"\n[host.\"https://m.example:444\"]";
    dirs.write(0, "docker.io/hosts.toml", text);
    let hosts = dirs.hosts.of("docker.io", &context()).unwrap();
    let told: Vec<_> = hosts.iter().map(|host| host.namespace.as_deref()).collect();
    assert_eq!(told, [Some("docker.io"), None]);
    let names: Vec<_> = hosts.iter().map(|host| host.name.as_str()).collect();
    assert_eq!(names, ["m.example:444", "registry-1.docker.io"]);
}
