//! The mounts that show a snapshot: what containerd's overlayfs snapshotter
//! gives for the same directories.

use std::path::{Path, PathBuf};

use super::snapshot::Kind;

/// One mount(2) call that containerd makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// File-system type.
    pub fs_type: &'static str,
    /// Directory of a bind mount, or a name for overlayfs.
    pub source: String,
    /// Options as fstab(5) has them.
    pub options: Vec<String>,
}

/// What the kernel needs to be told on every overlay mount of this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OverlayOptions {
    /// The kernel knows the inode index, which must be off where lower
    /// directories are shared by many mounts.
    pub index_off: bool,
    /// Overlayfs keeps its marks in `user.overlay.*`: the daemon runs in a
    /// user namespace.
    pub userxattr: bool,
}

impl OverlayOptions {
    /// Looks at the running kernel.
    pub fn probe() -> Self {
        Self {
            index_off: Path::new("/sys/module/overlay/parameters/index").exists(),
            userxattr: in_user_namespace(),
        }
    }
}

/// Whether user IDs are mapped other than one to one.
fn in_user_namespace() -> bool {
    let Ok(map) = std::fs::read_to_string("/proc/self/uid_map") else {
        return false;
    };
    let whole = ["0", "0", "4294967295"];
    map.split_whitespace().ne(whole)
}

/// The mounts of a snapshot with `upper` and `work` of its own, over `parents`,
/// nearest first.
pub(crate) fn mounts(
    kind: Kind,
    upper: &Path,
    work: &Path,
    parents: &[PathBuf],
    overlay: OverlayOptions,
) -> Vec<Mount> {
    let writable = kind == Kind::Active;
    let bind = |source: &Path| {
        vec![Mount {
            fs_type: "bind",
            source: source.display().to_string(),
            options: vec![
                if writable { "rw" } else { "ro" }.to_owned(),
                "rbind".to_owned(),
            ],
        }]
    };
    match parents {
        [] => return bind(upper),
        [only] if !writable => return bind(only),
        _ => {}
    }
    let mut options = Vec::new();
    if overlay.index_off {
        options.push("index=off".to_owned());
    }
    if overlay.userxattr {
        options.push("userxattr".to_owned());
    }
    if writable {
        options.push(format!("workdir={}", work.display()));
        options.push(format!("upperdir={}", upper.display()));
    }
    let lower: Vec<String> = parents.iter().map(|p| p.display().to_string()).collect();
    options.push(format!("lowerdir={}", lower.join(":")));
    vec![Mount {
        fs_type: "overlay",
        source: "overlay".to_owned(),
        options,
    }]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: Kind, parents: &[&str], overlay: OverlayOptions) -> (String, String, String) {
        let parents: Vec<PathBuf> = parents.iter().map(PathBuf::from).collect();
        let mut all = mounts(
            kind,
            Path::new("/s/9/fs"),
            Path::new("/s/9/work"),
            &parents,
            overlay,
        );
        assert_eq!(all.len(), 1);
        let mount = all.remove(0);
        (mount.fs_type.into(), mount.source, mount.options.join(","))
    }

    fn triple(fs_type: &str, source: &str, options: &str) -> (String, String, String) {
        (fs_type.into(), source.into(), options.into())
    }

    #[test]
    fn as_the_overlayfs_snapshotter_gives_them() {
        let plain = OverlayOptions::default();
        let bind = |source, options| triple("bind", source, options);
        let over = |options| triple("overlay", "overlay", options);
        assert_eq!(of(Kind::Active, &[], plain), bind("/s/9/fs", "rw,rbind"));
        assert_eq!(of(Kind::View, &[], plain), bind("/s/9/fs", "ro,rbind"));
        assert_eq!(of(Kind::View, &["/m/1"], plain), bind("/m/1", "ro,rbind"));
        assert_eq!(
            of(Kind::Active, &["/m/1"], plain),
            over("workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/m/1")
        );
        assert_eq!(
            of(Kind::View, &["/m/2", "/s/1/fs"], plain),
            over("lowerdir=/m/2:/s/1/fs")
        );
        let all = OverlayOptions {
            index_off: true,
            userxattr: true,
        };
        assert_eq!(
            of(Kind::Active, &["/m/1"], all),
            over("index=off,userxattr,workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=/m/1")
        );
    }
}
