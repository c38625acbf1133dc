//! What is started: programs that differ in kind, in images made here.

use anyhow::Result;
use sluice_tests::image::{self, Image};

/// A program and the image that it is started from.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// As the command line and the tables name it.
    pub name: &'static str,
    /// In words.
    pub about: &'static str,
    /// The image's name; workloads may share one.
    pub image: &'static str,
    make: fn() -> Result<Image>,
    /// What runs. It is ready with its first output, or else with its end.
    pub program: &'static [&'static str],
    /// The program whose profile there is, where that is another one.
    pub profiled: Option<&'static [&'static str]>,
}

impl Workload {
    /// Makes its image, or finds it in the cache.
    pub fn make_image(&self) -> Result<Image> {
        (self.make)()
    }
}

fn node() -> Result<Image> {
    image::with_packages("node", &["nodejs"], ":")
}

fn java() -> Result<Image> {
    let prepare = "mkdir -p /srv && cd /srv && \
        echo 'class Hello { public static void main(String[] a) { System.out.println(42); } }' \
        > Hello.java && javac Hello.java";
    image::with_packages("java", &["default-jdk-headless"], prepare)
}

fn gcc() -> Result<Image> {
    image::with_packages("gcc", &["gcc", "libc6-dev"], ":")
}

fn postgresql() -> Result<Image> {
    image::with_packages(
        "postgresql",
        &["postgresql"],
        "ls -d /var/lib/postgresql/*/main",
    )
}

const TRUE: &[&str] = &["/bin/true"];

const SCIENTIFIC: &[&str] = &[
    "python3",
    "-c",
    "import pandas, sklearn.linear_model; print(1)",
];

const NODE: &str = "const http = require('http'); \
    const server = http.createServer((_, answer) => answer.end('hello')); \
    server.listen(0, '127.0.0.1', () => http.get( \
    { host: '127.0.0.1', port: server.address().port }, \
    answer => { console.log(answer.statusCode); process.exit(0); }));";

const GCC: &str = "cd /tmp && printf '#include <stdio.h>\\nint main(void) { puts(\"built\"); }\\n' \
    > a.c && gcc -O2 a.c -o a && ./a";

const POSTGRESQL: &str = "cd / && pg=$(ls -d /usr/lib/postgresql/*) && v=${pg##*/} && \
    mkdir -p /run/postgresql && chown postgres /run/postgresql && \
    (setpriv --reuid=postgres --regid=postgres --init-groups $pg/bin/postgres \
    -D /var/lib/postgresql/$v/main -c config_file=/etc/postgresql/$v/main/postgresql.conf \
    >/dev/null 2>&1 &) && \
    n=0 && until setpriv --reuid=postgres --regid=postgres --init-groups \
    $pg/bin/psql -h /run/postgresql -Atc 'select 42' postgres 2>/dev/null; \
    do n=$((n + 1)); [ $n -lt 3000 ] || exit 1; sleep 0.02; done; \
    kill -INT $(head -1 /var/lib/postgresql/$v/main/postmaster.pid)";

const MODEL: &str = "dd if=/model of=/dev/null bs=1M status=none && echo read";

/// All of them.
pub const ALL: &[Workload] = &[
    Workload {
        name: "true",
        about: "/bin/true",
        image: "base",
        make: image::base,
        program: TRUE,
        profiled: None,
    },
    Workload {
        name: "python",
        about: "python3 -c 'print(1)'",
        image: "base",
        make: image::base,
        program: &["python3", "-c", "print(1)"],
        profiled: None,
    },
    Workload {
        name: "scientific",
        about: "import pandas, sklearn.linear_model",
        image: "scientific",
        make: image::scientific,
        program: SCIENTIFIC,
        profiled: None,
    },
    Workload {
        name: "misfit",
        about: "/bin/true on the scientific image, profiled for the import",
        image: "scientific",
        make: image::scientific,
        program: TRUE,
        profiled: Some(SCIENTIFIC),
    },
    Workload {
        name: "node",
        about: "a Node.js server answers its first request",
        image: "node",
        make: node,
        program: &["nodejs", "-e", NODE],
        profiled: None,
    },
    Workload {
        name: "java",
        about: "a JVM prints its first line",
        image: "java",
        make: java,
        program: &["java", "-cp", "/srv", "Hello"],
        profiled: None,
    },
    Workload {
        name: "gcc",
        about: "gcc compiles a file, which runs",
        image: "gcc",
        make: gcc,
        program: &["sh", "-c", GCC],
        profiled: None,
    },
    Workload {
        name: "postgresql",
        about: "PostgreSQL answers its first query",
        image: "postgresql",
        make: postgresql,
        program: &["sh", "-c", POSTGRESQL],
        profiled: None,
    },
    Workload {
        name: "model",
        about: "one file of 1 GiB is read to its end",
        image: "model",
        make: image::model,
        program: &["sh", "-c", MODEL],
        profiled: None,
    },
];

/// Which profile is there when the container is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// An ordinary pull, unpacked by containerd.
    Ordinary,
    /// Lazily, and nothing is known of the workload.
    Lazy,
    /// Lazily, with the profile that the node recorded at an earlier start.
    Recorded,
    /// Lazily, with a profile that is attached to the image in the registry.
    Attached,
    /// The same, where it carries the content as well.
    WithData,
    /// Lazily, from an image that was converted by the profile.
    BuiltIn,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Ordinary,
        Self::Lazy,
        Self::Recorded,
        Self::Attached,
        Self::WithData,
        Self::BuiltIn,
    ];

    /// As the command line and the tables name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ordinary => "ordinary",
            Self::Lazy => "lazy",
            Self::Recorded => "recorded",
            Self::Attached => "attached",
            Self::WithData => "with-data",
            Self::BuiltIn => "built-in",
        }
    }
}
