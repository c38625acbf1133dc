//! What a container is to run, as `ctr run` would have it: the default
//! specification, filled in from the image's configuration.

use anyhow::bail;
use serde::Deserialize;
use serde_json::{Value, json};

/// The part of an image's configuration that a container is made of.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ImageConfig {
    #[serde(default)]
    pub(super) config: Process,
}

/// What the image says of its process.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Process {
    pub(super) user: String,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: String,
}

/// Who runs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Those that containerd gives by default.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/proc/scsi",
];

const READ_ONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

impl Process {
    /// What to run: `args` when there are any, otherwise what the image says.
    fn command(&self, args: &[String]) -> anyhow::Result<Vec<String>> {
        if !args.is_empty() {
            return Ok(args.to_vec());
        }
        let parts = [&self.entrypoint, &self.cmd];
        let command: Vec<String> = parts.into_iter().flatten().flatten().cloned().collect();
        if command.is_empty() {
            bail!("the image has neither entrypoint nor command; say what to run: -- COMMAND");
        }
        Ok(command)
    }

    fn environment(&self) -> Vec<String> {
        let mut env = self.env.clone().unwrap_or_default();
        if !env.iter().any(|variable| variable.starts_with("PATH=")) {
            env.insert(0, PATH.to_owned());
        }
        env
    }
}

/// The runtime's specification of container `id` in `namespace`.
pub(super) fn spec(
    process: &Process,
    args: &[String],
    user: &User,
    namespace: &str,
    id: &str,
) -> anyhow::Result<Value> {
    let mount = |target: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": source, "options": options});
    let device = |major: i64, minor: Option<i64>| {
        let mut rule = json!({"allow": true, "type": "c", "major": major, "access": "rwm"});
        if let Some(minor) = minor {
            rule["minor"] = minor.into();
        }
        rule
    };
    let cwd = match process.working_dir.as_str() {
        "" => "/",
        directory => directory,
    };
    let namespaces = ["pid", "ipc", "uts", "mount", "network"];
    Ok(json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
            "args": process.command(args)?,
            "env": process.environment(),
            "cwd": cwd,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs"},
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/run", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        "linux": {
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "access": "m"},
                {"allow": true, "type": "b", "access": "m"},
                device(1, Some(3)), device(1, Some(5)), device(1, Some(7)), device(1, Some(8)),
                device(1, Some(9)), device(5, Some(0)), device(5, Some(1)), device(5, Some(2)),
                device(136, None),
            ]},
            "cgroupsPath": format!("/{namespace}/{id}"),
            "namespaces": namespaces.map(|kind| json!({"type": kind})),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    }))
}

/// Finds the user that an image names: `user`, `uid`, `user:group` or with
/// numbers, by the image's own `passwd` and `group`.
pub(super) fn resolve(name: &str, passwd: &str, group: &str) -> anyhow::Result<User> {
    let (user, wanted) = match name.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (name, None),
    };
    let lines = |text: &str| -> Vec<Vec<String>> {
        let fields = |line: &str| line.split(':').map(str::to_owned).collect();
        text.lines().map(fields).collect()
    };
    let number = |fields: &[String], at: usize| fields.get(at).and_then(|n| n.parse::<u32>().ok());
    let (accounts, groups) = (lines(passwd), lines(group));
    let uid = user.parse::<u32>().ok();
    let account = accounts.iter().find(|fields| match uid {
        Some(_) => number(fields, 2) == uid,
        None => fields[0] == user,
    });
    let Some(uid) = uid.or_else(|| account.and_then(|fields| number(fields, 2))) else {
        bail!("the image's user '{user}' is not in its /etc/passwd");
    };
    let mut found = User {
        uid,
        gid: account.and_then(|fields| number(fields, 3)).unwrap_or(0),
        groups: Vec::new(),
    };
    if let Some(wanted) = wanted {
        let by_name = || {
            let entry = groups.iter().find(|fields| fields[0] == wanted);
            entry.and_then(|fields| number(fields, 2))
        };
        let Some(gid) = wanted.parse().ok().or_else(by_name) else {
            bail!("the image's group '{wanted}' is not in its /etc/group");
        };
        found.gid = gid;
    } else if let Some(account) = account {
        let member = |fields: &&Vec<String>| {
            let members = fields.get(3).map(String::as_str).unwrap_or_default();
            members.split(',').any(|member| member == account[0])
        };
        let entries = groups.iter().filter(member);
        found.groups = entries.filter_map(|fields| number(fields, 2)).collect();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(all: &[&str]) -> Vec<String> {
        all.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn the_image_says_what_runs_unless_the_caller_does() {
        let config: ImageConfig = serde_json::from_value(json!({
            "config": {"User": "app", "Env": ["A=1"], "Entrypoint": ["/run.sh"], "Cmd": ["x"],
                "WorkingDir": "/srv", "Volumes": {}},
            "rootfs": {},
        }))
        .unwrap();
        let process = config.config;
        let of = |args: &[&str]| {
            spec(&process, &strings(args), &User::default(), "ns", "id").unwrap()["process"].clone()
        };
        assert_eq!(of(&[])["args"], json!(["/run.sh", "x"]));
        assert_eq!(of(&["true"])["args"], json!(["true"]));
        assert_eq!(of(&[])["env"], json!([PATH, "A=1"]));
        assert_eq!(of(&[])["cwd"], "/srv");
        let empty: ImageConfig = serde_json::from_str("{\"config\":{\"Cmd\":null}}").unwrap();
        assert!(spec(&empty.config, &[], &User::default(), "ns", "id").is_err());
    }

    #[test]
    fn users_are_found_as_the_image_names_them() {
        let passwd = "root:x:0:0::/:/bin/sh\napp:x:7:8::/:/bin/sh\n\nbroken\n";
        let group = "root:x:0:\nmore:x:9:app,other\nrest:x:10:other\n";
        let of = |name| {
            let user = resolve(name, passwd, group).ok()?;
            Some((user.uid, user.gid, user.groups))
        };
        assert_eq!(of("app"), Some((7, 8, vec![9])));
        assert_eq!(of("7"), Some((7, 8, vec![9])));
        assert_eq!(of("app:rest"), Some((7, 10, vec![])));
        assert_eq!(of("app:77"), Some((7, 77, vec![])));
        assert_eq!(of("1234"), Some((1234, 0, vec![])));
        assert_eq!(of("1234:5"), Some((1234, 5, vec![])));
        assert_eq!(of("nobody"), None);
        assert_eq!(of("app:nobody"), None);
    }
}
