//! Named places, one after each step of every change of state, at which a test
//! kills the daemon to see what the next process makes of it.
//!
//! Without the cargo feature `crash-points` they compile to nothing. With it,
//! the environment variable [`FILE`] names a file whose first line says where
//! to strike: `<point>`, `<point> <n>` for the n-th time that it is reached, or
//! `<point> hold` to wait there for as long as the line stands. A line that has
//! struck is taken out, so that the next process meets the next line.

/// Names the file that says where to strike. What struck is appended to a file
/// of that name with `.struck` added: the point, a space, and the process.
pub const FILE: &str = "SLUICE_CRASH_POINTS";

/// Every point there is, in the order in which a change passes them.
pub const POINTS: &[&str] = &[
    // A root directory and its mounts come to be.
    "start.root-taken",
    "database.drafted",
    "database.initialised",
    "database.named",
    "start.database-opened",
    "probe.mounted",
    "probe.unmounted",
    "start.probed",
    "marker.opened",
    "marker.written",
    "marker.set",
    "session.mounted",
    "session.negotiated",
    "keep.forgotten",
    "keep.terms-stored",
    "keep.device-stored",
    "start.served",
    "start.directories-restored",
    "start.orphans-removed",
    "start.layers-retained",
    "start.ready",
    // A process goes on where another ended.
    "start.lost-detached",
    "start.taken-over",
    "start.tidied",
    "start.cleared",
    "start.resumed",
    "adopt.replayed",
    "adopt.in-place",
    "adopt.resent",
    // What a process left that did not end in order is verified.
    "verify.layer-done",
    "verify.settled",
    // A change of the database, whichever it is.
    "database.begun",
    "database.changed",
    "database.committed",
    // A snapshot is made.
    "prepare.lower-mounted",
    "prepare.directory-made",
    "prepare.upper-made",
    "prepare.upper-owned",
    "prepare.directories-made",
    "prepare.recorded",
    // A snapshot is committed.
    "commit.measured",
    "commit.recorded",
    // A snapshot is removed.
    "remove.recorded",
    "remove.directory-removed",
    // A layer is opened for the first time.
    "number.noted",
    "number.taken",
    "compile.directory-made",
    "compile.meta-written",
    "compile.meta-synced",
    "compile.data-made",
    "compile.chunks-written",
    "compile.filled",
    "compile.named",
    "compile.synced",
    "open.opened",
    "open.recorded",
    // A layer is mounted.
    "mount.target-made",
    "mount.mounted",
    "mount.shown",
    // Then it is added to the index of chunks.
    "index.drafted",
    "index.named",
    "index.merged",
    // A layer is removed.
    "release.closed",
    "release.unmounted",
    "release.target-removed",
    "release.renamed",
    "release.deleted",
    // A layer's content is evicted.
    "evict.unmounted",
    "evict.target-removed",
    "evict.present-removed",
    "evict.data-made",
    "evict.data-named",
    "evict.synced",
    // What describes a damaged layer is made again.
    "mend.compiled",
    "mend.written",
    "mend.done",
    // Chunks become present, and durable.
    "fill.claimed",
    "fill.arrived",
    "fill.verified",
    "fill.written",
    "fill.present",
    "fill.told",
    "rest.opened",
    "rest.written",
    // Chunks are taken from other layers.
    "copy.found",
    "copy.told",
    "persist.taken",
    "persist.data-synced",
    "persist.new-made",
    "persist.new-written",
    "persist.new-synced",
    "persist.named",
    "persist.synced",
    // What a layer's tar is becomes known.
    "prove.known",
    "prove.written",
    "prove.named",
    "prove.rest-removed",
    // The daemon stops in good order.
    "stop.begun",
    "stop.drained",
    "stop.closed",
    "leave.persisted",
    "leave.left",
    "marker.cleared",
    "end.layers-closed",
    "end.forgotten",
    "end.unmounted",
];

/// Whether `name` is one of [`POINTS`].
pub const fn is_listed(name: &str) -> bool {
    let mut at = 0;
    while at < POINTS.len() {
        if same(POINTS[at].as_bytes(), name.as_bytes()) {
            return true;
        }
        at += 1;
    }
    false
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut at = 0;
    while at < a.len() {
        if a[at] != b[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// A place at which a test may kill the daemon. A name that is not in
/// [`POINTS`] does not compile.
macro_rules! crash_point {
    ($name:literal) => {{
        const _: () = assert!($crate::crash_points::is_listed($name));
        #[cfg(feature = "crash-points")]
        $crate::crash_points::reached($name);
    }};
}

/// Does what the file asks for at this point.
#[cfg(feature = "crash-points")]
pub(crate) fn reached(name: &str) {
    use std::path::PathBuf;
    use std::sync::LazyLock;

    static ORDERS: LazyLock<Option<PathBuf>> =
        LazyLock::new(|| std::env::var_os(FILE).map(PathBuf::from));
    static TURN: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

    let Some(orders) = ORDERS.as_deref() else {
        return;
    };
    let read = || std::fs::read_to_string(orders).unwrap_or_default();
    let turn = TURN.lock();
    let text = read();
    let (line, rest) = text.split_once('\n').unwrap_or((&text, ""));
    let (point, how) = line.split_once(' ').unwrap_or((line, "1"));
    if point != name {
        return;
    }
    if how == "hold" {
        drop(turn);
        strike(orders, name);
        while read().starts_with(line) {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        return;
    }
    match how.parse() {
        Ok(times @ 2..) => replace(orders, &format!("{name} {}\n{rest}", times - 1_u32)),
        _ => {
            strike(orders, name);
            replace(orders, rest);
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
            // Nothing more happens in this thread before the end.
            loop {
                std::thread::park();
            }
        }
    }
}

/// Whoever reads the file sees the old or the new one, whole.
#[cfg(feature = "crash-points")]
fn replace(orders: &std::path::Path, text: &str) {
    let draft = orders.with_extension("draft");
    let replaced = std::fs::write(&draft, text).and_then(|()| std::fs::rename(&draft, orders));
    replaced.expect("the file of crash points can be written");
}

#[cfg(feature = "crash-points")]
fn strike(orders: &std::path::Path, name: &str) {
    use std::io::Write as _;

    let mut path = orders.as_os_str().to_owned();
    path.push(".struck");
    let line = format!("{name} {}\n", std::process::id());
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(path);
    let told = file.and_then(|mut file| file.write_all(line.as_bytes()));
    told.expect("the file of points that struck can be written");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_point_is_listed_twice() {
        for (index, name) in POINTS.iter().enumerate() {
            assert!(!POINTS[..index].contains(name), "{name}");
            assert!(is_listed(name));
        }
        assert!(!is_listed("fill"));
        assert!(!is_listed(""));
    }
}
