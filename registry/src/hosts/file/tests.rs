use super::*;

const PATH: &str = "/etc/certs.d/r.io/hosts.toml";

fn parsed(text: &str) -> Vec<Entry> {
    parse(text, Path::new(PATH)).unwrap()
}

fn roots(text: &str) -> Vec<String> {
    let root = |entry: &Entry| {
        let root = entry.root.as_ref();
        root.map_or_else(|| "own".to_owned(), ToString::to_string)
    };
    parsed(text).iter().map(root).collect()
}

#[test]
fn hosts_are_in_the_order_of_the_file_and_the_server_is_last() {
    let text = r#"
        server = "https://z.example"
        [host."https://b.example"]
        [host."http://a.example:5000/".header]
        x-one = "1"
        [host."c.example"]
        [host."http://a.example:5000/"]
        capabilities = ["pull"]
    "#;
    assert_eq!(
        roots(text),
        [
            "https://b.example/v2",
            "http://a.example:5000/v2",
            "https://c.example/v2",
            "https://z.example/v2",
        ]
    );
    assert_eq!(roots("[host.\"https://b\"]"), ["https://b/v2", "own"]);
    assert_eq!(roots(""), ["own"]);
    assert_eq!(roots("server = ''"), ["own"]);
}

#[test]
fn paths_end_in_the_version_unless_they_override_it() {
    for (url, more, expected) in [
        ("https://m/v2", "", "https://m/v2"),
        ("https://m/v2/", "", "https://m/v2"),
        ("https://m/proxy", "", "https://m/proxy/v2"),
        ("https://m/v2/r.io", "", "https://m/v2/r.io/v2"),
        (
            "https://m/v2/r.io",
            "override_path = true",
            "https://m/v2/r.io",
        ),
        ("https://m", "override_path = true", "https://m/"),
    ] {
        let text = format!("[host.\"{url}\"]\n{more}\n");
        assert_eq!(roots(&text)[0], expected, "{url} {more}");
    }
}

#[test]
fn every_field_is_read_for_a_host_and_for_the_server() {
    let fields = r#"
        capabilities = ["Pull", "resolve"]
        ca = "ca.pem"
        client = [["c.cert", "c.key"], ["/both.pem", ""], "single.pem"]
        skip_verify = true
        dial_timeout = "1m1.5s"
        proxy = "http://proxy:8080"
        some_key_of_the_future = 1
    "#;
    let host = format!("[host.\"https://m\"]\n{fields}\n[host.\"https://m\".header]\n");
    let texts = [
        format!("{host}x-one = \"a\"\nx-two = [\"b\", \"c\"]"),
        format!("{fields}\n[header]\nx-one = \"a\"\nx-two = [\"b\", \"c\"]"),
    ];
    for text in texts {
        let entry = &parsed(&text)[0];
        let Capabilities {
            pull,
            resolve,
            push,
        } = entry.capabilities;
        assert!(pull && resolve && !push);
        let directory = Path::new("/etc/certs.d/r.io");
        assert_eq!(entry.ca, [directory.join("ca.pem")]);
        let pair = |certificate: PathBuf, key: Option<PathBuf>| ClientPair { certificate, key };
        assert_eq!(
            entry.client,
            [
                pair(directory.join("c.cert"), Some(directory.join("c.key"))),
                pair("/both.pem".into(), None),
                pair(directory.join("single.pem"), None),
            ]
        );
        assert_eq!(entry.skip_verify, Some(true));
        assert_eq!(entry.dial_timeout, Some(Duration::from_millis(61_500)));
        assert_eq!(entry.proxy.as_ref().unwrap().as_str(), "http://proxy:8080/");
        assert_eq!(entry.headers["x-one"], "a");
        let two: Vec<_> = entry.headers.get_all("x-two").iter().collect();
        assert_eq!(two, ["b", "c"]);
        assert!(entry.headers["x-one"].is_sensitive());
    }
    let entry = &parsed("ca = ['/a', 'b']\nclient = 'c.pem'\ncapabilities = []")[0];
    assert_eq!(entry.ca.len(), 2);
    assert_eq!(entry.client.len(), 1);
    assert_eq!(entry.capabilities, Capabilities::ALL);
}

#[test]
fn mistakes_are_named_with_file_line_and_remedy() {
    for (text, line, says) in [
        ("\nserver = 1", 2, "write a string"),
        ("server = \"https://", 1, "write it as TOML"),
        ("host = 'https://m'", 1, "write a table"),
        (
            "[host.\"https://m\"]\ncapabilities = ['pul']",
            2,
            "there are pull",
        ),
        ("capabilities = 'pull'", 1, "write a list"),
        ("ca = 1", 1, "write a path"),
        ("ca = ['a',\n1]", 2, "write a string"),
        ("client = true", 1, "write a path"),
        ("client = [['a', 'b', 'c']]", 1, "two paths"),
        ("client = [[\"a\"]]", 1, "two paths"),
        ("client = [1]", 1, "write a path"),
        ("skip_verify = 'no'", 1, "true or false"),
        ("dial_timeout = '10'", 1, "\"10s\""),
        ("dial_timeout = '0s'", 1, "\"10s\""),
        ("proxy = 'proxy:80'", 1, "http://proxy:8080"),
        ("[header]\n'a b' = 'c'", 2, "letters"),
        ("[header]\na = \"\\u0000\"", 2, "control"),
        ("[header]\na = 1", 2, "write a string"),
        ("[host.'https://u:secret@m']", 1, "Docker configuration"),
        ("[host.'https://m?x=1']", 1, "https://host:port"),
        ("server = 'ftp://m'", 1, "https://host:port"),
        ("server = 'https://'", 1, "https://host:port"),
    ] {
        let error = parse(text, Path::new(PATH)).unwrap_err().to_string();
        let place = format!("{PATH}:{line}: ");
        assert!(
            error.starts_with(&place) && error.contains(says),
            "{text}: {error}"
        );
        assert!(
            !error.contains('\n') && !error.contains("secret"),
            "{error}"
        );
    }
}

#[test]
fn times_are_those_of_go() {
    for (text, millis) in [
        ("250ms", Some(250)),
        ("1h1m1s", Some(3_661_000)),
        ("1.5s", Some(1500)),
        ("2000us", Some(2)),
        ("", None),
        ("s", None),
        ("5", None),
        ("-1s", None),
        ("1 s", None),
        ("1d", None),
    ] {
        let found = duration(text).map(|found| found.as_millis());
        assert_eq!(found, millis, "{text}");
    }
}
