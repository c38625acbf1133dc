//! Real images: the distribution of this machine, with and without a
//! scientific Python.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::{Compression, Image, LayoutWriter, TAG};
use crate::command::{run, text};
use crate::scratch::Scratch;

/// Python packages, exact. The first two, with what they need, are what the
/// demo imports; the others are what such an image carries along.
const PACKAGES: &[&str] = &[
    "numpy==2.2.6",
    "pandas==2.3.3",
    "scipy==1.15.3",
    "scikit-learn==1.7.2",
    "matplotlib==3.10.7",
    "statsmodels==0.14.5",
    "numba==0.62.1",
    "polars==1.35.2",
];
/// The same for Python 3.14 and later, which those do not know.
const PACKAGES_314: &[&str] = &[
    "numpy==2.3.5",
    "pandas==2.3.3",
    "scipy==1.16.3",
    "scikit-learn==1.7.2",
    "matplotlib==3.10.7",
    "statsmodels==0.14.6",
    "numba==0.63.1",
    "polars==1.35.2",
];
/// What goes into the first Python layer, by prefix.
const FIRST_LAYER: &[&str] = &[
    "numpy",
    "pandas",
    "pytz",
    "tzdata",
    "dateutil",
    "python_dateutil",
    "six",
];

/// A minimal distribution with Python, in one layer.
pub fn base() -> Result<Image> {
    let source = Source::of_this_machine()?;
    Image::cached("base", &format!("base 1 {}", source.codename), |dir| {
        let mut layout = LayoutWriter::new(dir)?;
        let scratch = Scratch::new()?;
        let root = scratch.path().join("root");
        source.bootstrap(&root, &[])?;
        add_base(&mut layout, &root)?;
        layout.finish(TAG, &["/bin/sh"])
    })
}

/// The same with numpy, pandas and a few hundred megabytes beside them, in
/// three layers.
pub fn scientific() -> Result<Image> {
    let source = Source::of_this_machine()?;
    let recipe = format!(
        "scientific 1 {} {PACKAGES:?} {PACKAGES_314:?}",
        source.codename
    );
    Image::cached("scientific", &recipe, |dir| {
        let mut layout = LayoutWriter::new(dir)?;
        let scratch = Scratch::new()?;
        let root = scratch.path().join("root");
        source.bootstrap(&root, &[])?;
        add_base(&mut layout, &root)?;

        let python = python_version(&root)?;
        let packages = format!("usr/local/lib/python3.{python}/dist-packages");
        install_packages(&root, &packages, python)?;
        let is_first = |name: &str| FIRST_LAYER.iter().any(|prefix| name.starts_with(prefix));
        let mut names: Vec<String> = fs::read_dir(root.join(&packages))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.sort();
        for first in [true, false] {
            let mut list: Vec<PathBuf> = Path::new(&packages)
                .ancestors()
                .filter(|dir| !dir.as_os_str().is_empty())
                .map(Path::to_owned)
                .collect();
            list.reverse();
            let parents = list.len();
            list.extend(
                names
                    .iter()
                    .filter(|name| is_first(name) == first)
                    .map(|name| Path::new(&packages).join(name)),
            );
            layout.layer(Compression::Gzip, |to| pack(&root, &list, parents, to))?;
        }
        layout.finish(TAG, &["python3"])
    })
}

/// Where this machine gets its packages.
pub(super) struct Source {
    uri: String,
    /// Ubuntu keeps in `universe` much of what Debian has in `main`.
    components: Vec<&'static str>,
    pub(super) codename: String,
}

impl Source {
    /// From apt itself, which knows every way of writing sources down.
    pub(super) fn of_this_machine() -> Result<Self> {
        let codename = fs::read_to_string("/etc/os-release")?
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .context("/etc/os-release names no VERSION_CODENAME")?
            .trim_matches('"')
            .to_owned();
        let targets = text(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(CODENAME) $(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ]))?;
        let uris = |component: &str| {
            let prefix = format!("{codename} {component} ");
            targets
                .lines()
                .filter_map(move |line| Some(line.strip_prefix(&prefix)?.to_owned()))
        };
        let uri = uris("main")
            .next()
            .with_context(|| format!("apt has no source for {codename} main; add one"))?;
        let has = |component: &&str| uris(component).any(|other| other == uri);
        let components = ["main", "universe"].into_iter().filter(has).collect();
        Ok(Self {
            uri,
            components,
            codename,
        })
    }

    /// The smallest distribution with Python and some more packages.
    pub(super) fn bootstrap(&self, root: &Path, more: &[&str]) -> Result<()> {
        let packages = [&["python3", "ca-certificates"], more].concat();
        let outcome = run(Command::new("debootstrap")
            .arg("--variant=minbase")
            .arg(format!("--components={}", self.components.join(",")))
            .arg(format!("--include={}", packages.join(",")))
            .arg(&self.codename)
            .arg(root)
            .arg(&self.uri));
        crate::scratch::unmount_below(root);
        outcome.context("debootstrap failed")?;
        for dir in ["var/cache/apt/archives", "var/lib/apt/lists"] {
            fs::remove_dir_all(root.join(dir))?;
            fs::create_dir_all(root.join(dir).join("partial"))?;
        }
        Ok(())
    }
}

fn add_base(layout: &mut LayoutWriter, root: &Path) -> Result<()> {
    layout.layer(Compression::Gzip, |to| pack(root, &[".".into()], 0, to))
}

/// The minor version of the root's Python 3.
fn python_version(root: &Path) -> Result<u32> {
    let link = fs::read_link(root.join("usr/bin/python3"))?;
    let name = link.to_string_lossy();
    name.rsplit_once("python3.")
        .and_then(|(_, minor)| minor.parse().ok())
        .with_context(|| format!("{name} is no Python 3"))
}

fn install_packages(root: &Path, packages: &str, python: u32) -> Result<()> {
    let list = if python < 14 { PACKAGES } else { PACKAGES_314 };
    let arch = std::env::consts::ARCH;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-compile"])
        .args(["--disable-pip-version-check", "--root-user-action=ignore"])
        .arg("--target")
        .arg(root.join(packages))
        // For the image's Python, whichever runs pip here.
        .args(["--only-binary=:all:", "--implementation=cp"])
        .arg(format!("--python-version=3.{python}"));
    for glibc in ["2_28", "2_27", "2_24", "2_17"] {
        pip.arg(format!("--platform=manylinux_{glibc}_{arch}"));
    }
    pip.arg(format!("--platform=manylinux2014_{arch}"))
        .args(list);
    run(&mut pip).context("pip cannot install the scientific packages")?;
    // As pip does when it installs for the Python that runs it.
    run(Command::new("chroot")
        .arg(root)
        .args(["python3", "-m", "compileall", "-q"])
        .arg(format!("/{packages}")))?;
    Ok(())
}

/// Packs paths below the root; of the first `parents` only the directory
/// itself.
fn pack(root: &Path, paths: &[PathBuf], parents: usize, to: &mut dyn std::io::Write) -> Result<()> {
    let mut tar = tar_of(root);
    tar.arg("--no-recursion")
        .args(&paths[..parents])
        .arg("--recursion")
        .args(&paths[parents..]);
    pack_with(tar, root, to)
}

/// The command that packs what further arguments name below the root.
pub(super) fn tar_of(root: &Path) -> Command {
    let mut tar = Command::new("tar");
    tar.arg("--directory")
        .arg(root)
        .args(["--create", "--file=-", "--sort=name", "--numeric-owner"])
        .args(["--xattrs", "--xattrs-include=*", "--format=pax"])
        .arg("--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime");
    tar
}

/// Runs it.
pub(super) fn pack_with(mut tar: Command, root: &Path, to: &mut dyn std::io::Write) -> Result<()> {
    let mut tar = tar
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run tar")?;
    let mut output = tar.stdout.take().context("tar has no output")?;
    std::io::copy(&mut output, to)?;
    to.flush()?;
    let status = tar.wait()?;
    if !status.success() {
        bail!("tar of {} ended with {status}", root.display());
    }
    Ok(())
}
