//! Which images may be mounted lazily.

use sluice_oci::Reference;

/// Registries and repositories. Without any, all are allowed.
///
/// A layer that is mounted before it was downloaded is taken for what the
/// image's configuration calls it, which only the whole of it could prove. So
/// who may name layers is a matter of trust.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LazyFrom(Vec<String>);

impl LazyFrom {
    /// Each place is `host[:port]`, or that and the beginning of a repository,
    /// up to a `/` of it.
    pub fn new(places: impl IntoIterator<Item = String>) -> Self {
        let places = places.into_iter();
        Self(places.map(|p| p.trim_end_matches('/').to_owned()).collect())
    }

    /// Whether the image is from one of the places.
    pub(super) fn allows(&self, image: &Reference) -> bool {
        let name = format!("{}/{}", image.host(), image.repository());
        let covers = |place: &String| {
            name.strip_prefix(place.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.0.is_empty() || self.0.iter().any(covers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(places: &[&str], image: &str) -> bool {
        let places = places.iter().map(|place| (*place).to_owned());
        LazyFrom::new(places).allows(&image.parse().unwrap())
    }

    #[test]
    fn places_are_hosts_and_beginnings_of_repositories() {
        assert!(allows(&[], "r.example/a:1"));
        for (place, image, allowed) in [
            ("r.example", "r.example/a:1", true),
            ("r.example/", "r.example/a/b:1", true),
            ("r.example", "r.example.evil/a:1", false),
            ("r.example", "r.example:5000/a:1", false),
            ("r.example:5000", "r.example:5000/a:1", true),
            ("r.example/team", "r.example/team/app:1", true),
            ("r.example/team", "r.example/team:1", true),
            ("r.example/team", "r.example/teams/app:1", false),
            ("r.example/team", "evil/r.example/team/app:1", false),
            ("docker.io/library", "ubuntu", true),
            ("docker.io/library", "evil/ubuntu", false),
            ("", "r.example/a:1", false),
        ] {
            assert_eq!(allows(&[place], image), allowed, "{place} {image}");
        }
    }
}
