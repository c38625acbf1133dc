//! Extended attributes: which are kept.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::Xattr;
use super::error::{EntryError, printable};
use super::json::EncodedXattr;

const MAX_NAME: usize = 255;
/// One byte less than Linux takes, so that 16 bits hold it.
const MAX_VALUE: usize = 65_535;
/// Names and values of one inode.
const MAX_TOTAL: usize = 128 << 10;

/// What kind of inode an attribute is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Regular,
    Directory,
    Other,
}

/// Decodes an entry's attributes, sorted by name. What containerd's unpacking
/// does not set is dropped: `trusted.*`, namespaces that Linux does not know,
/// and `user.*` on anything but files and directories. So is
/// `user.overlay.*`, which a mount with `userxattr` would take for its own.
pub(super) fn parse(
    encoded: &[EncodedXattr<'_>],
    owner: Owner,
) -> Result<Box<[Xattr]>, EntryError> {
    let mut kept: Vec<Xattr> = Vec::new();
    let mut total = 0;
    for (name, value) in encoded {
        if !wanted(name, owner)? {
            continue;
        }
        let value = STANDARD
            .decode(value)
            .map_err(|_| EntryError::XattrValue(printable(name)))?;
        total += name.len() + value.len();
        if value.len() > MAX_VALUE || total > MAX_TOTAL {
            return Err(EntryError::XattrSize(printable(name)));
        }
        kept.push(Xattr {
            name: name.as_ref().into(),
            value: value.into(),
        });
    }
    Ok(sorted(kept))
}

/// Adds the attributes of a second entry for the same inode: of equal names
/// the later stays.
pub(super) fn merge(old: &[Xattr], new: &[Xattr]) -> Result<Box<[Xattr]>, EntryError> {
    let merged = sorted([old, new].concat());
    let mut total = 0;
    for xattr in &merged {
        total += xattr.name.len() + xattr.value.len();
        if total > MAX_TOTAL {
            return Err(EntryError::XattrSize(printable(&xattr.name)));
        }
    }
    Ok(merged)
}

fn sorted(mut xattrs: Vec<Xattr>) -> Box<[Xattr]> {
    // A stable sort of the reversed list puts the last of equal names first.
    xattrs.reverse();
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    xattrs.dedup_by(|b, a| a.name == b.name);
    xattrs.into()
}

fn wanted(name: &[u8], owner: Owner) -> Result<bool, EntryError> {
    if name.len() > MAX_NAME || name.contains(&0) {
        return Err(EntryError::XattrName(printable(name)));
    }
    if name.starts_with(b"user.overlay.") {
        return Ok(false);
    }
    for (prefix, kept) in [
        (&b"user."[..], owner != Owner::Other),
        (&b"security."[..], true),
    ] {
        if let Some(rest) = name.strip_prefix(prefix) {
            if rest.is_empty() {
                return Err(EntryError::XattrName(printable(name)));
            }
            return Ok(kept);
        }
    }
    Ok(match name {
        b"system.posix_acl_access" => owner != Owner::Other,
        b"system.posix_acl_default" => owner == Owner::Directory,
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[(&str, &str)], owner: Owner) -> Result<Vec<String>, EntryError> {
        let encoded: Vec<_> = list
            .iter()
            .map(|(name, value)| (name.as_bytes().into(), value.as_bytes().into()))
            .collect();
        Ok(parse(&encoded, owner)?
            .iter()
            .map(|xattr| {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                format!("{}={}", text(&xattr.name), text(&xattr.value))
            })
            .collect())
    }

    #[test]
    fn keeps_what_unpacking_sets() {
        let list = [
            ("user.b", "Yg=="),
            ("trusted.overlay.opaque", "eQ=="),
            ("trusted.x", "eQ=="),
            ("user.overlay.redirect", "eQ=="),
            ("nonsense", "not base64 at all"),
            ("system.posix_acl_access", "QUNM"),
            ("system.posix_acl_default", "QUNM"),
            ("security.capability", "Y2Fw"),
            ("user.a", ""),
        ];
        assert_eq!(
            names(&list, Owner::Regular).unwrap(),
            [
                "security.capability=cap",
                "system.posix_acl_access=ACL",
                "user.a=",
                "user.b=b"
            ]
        );
        assert_eq!(names(&list, Owner::Directory).unwrap().len(), 5);
        assert_eq!(
            names(&list, Owner::Other).unwrap(),
            ["security.capability=cap"]
        );
    }

    #[test]
    fn of_equal_names_the_last_stays() {
        let list = [("user.a", "MQ=="), ("user.b", "Mg=="), ("user.a", "Mw==")];
        assert_eq!(
            names(&list, Owner::Regular).unwrap(),
            ["user.a=3", "user.b=2"]
        );
    }

    #[test]
    fn refuses_what_linux_would_not_take() {
        let long = format!("user.{}", "x".repeat(251));
        let big = STANDARD.encode(vec![0; MAX_VALUE + 1]);
        let half = STANDARD.encode(vec![0; MAX_VALUE]);
        assert!(matches!(
            names(&[("user.", "")], Owner::Regular),
            Err(EntryError::XattrName(_))
        ));
        assert!(matches!(
            names(&[(&long, "")], Owner::Regular),
            Err(EntryError::XattrName(_))
        ));
        assert!(matches!(
            names(&[("user.a", "!")], Owner::Regular),
            Err(EntryError::XattrValue(_))
        ));
        assert!(matches!(
            names(&[("user.a", &big)], Owner::Regular),
            Err(EntryError::XattrSize(_))
        ));
        assert!(names(&[("user.a", &half)], Owner::Regular).is_ok());
        let three = [("user.a", &*half), ("user.b", &half), ("user.c", &half)];
        assert!(matches!(
            names(&three, Owner::Regular),
            Err(EntryError::XattrSize(_))
        ));
    }
}
