//! A registry in this process, which counts requests and can be told to
//! misbehave.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::json;
use sluice_oci::Digest;

use super::Sample;

/// One request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) path: String,
    /// Start and end of the range that was answered.
    pub(crate) range: Option<(u64, u64)>,
}

/// What to do instead of answering.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Only this status.
    Status(u16),
    /// Close the connection after so many bytes.
    Cut(usize),
    /// Send nothing more after so many bytes until the registry is dropped or
    /// told to go on.
    Stall(usize),
    /// Flip a bit of the blob's byte at this offset, if it is in the range.
    Tamper(u64),
    /// The whole blob with status 200.
    IgnoreRange,
}

type Decide = Box<dyn FnMut(&Request) -> Option<Fault> + Send>;

struct State {
    documents: HashMap<String, (String, Vec<u8>)>,
    blobs: HashMap<String, Arc<Vec<u8>>>,
    log: Mutex<Vec<Request>>,
    decide: Mutex<Decide>,
    stalled: AtomicBool,
    stopped: AtomicBool,
}

/// Serves `app:v1`, and all its documents by digest.
pub(crate) struct Registry {
    address: SocketAddr,
    state: Arc<State>,
}

impl Registry {
    /// Serves an image with these layers and annotations for each.
    pub(crate) fn serve(layers: &[(&Sample, serde_json::Value)]) -> Self {
        let mut blobs = HashMap::new();
        let descriptors: Vec<_> = layers
            .iter()
            .map(|(sample, annotations)| {
                blobs.insert(sample.digest().to_string(), Arc::new(sample.blob.clone()));
                json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": sample.digest().to_string(),
                    "size": sample.blob.len(),
                    "annotations": annotations,
                })
            })
            .collect();
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": kind,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::of(b"{}").to_string(),
                "size": 2,
            },
            "layers": descriptors,
        }))
        .unwrap();
        let digest = Digest::of(&manifest).to_string();
        let documents = [digest, "v1".to_owned()]
            .map(|name| (name, (kind.to_owned(), manifest.clone())))
            .into();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            documents,
            blobs,
            log: Mutex::default(),
            decide: Mutex::new(Box::new(|_| None)),
            stalled: AtomicBool::new(true),
            stopped: AtomicBool::new(false),
        });
        let serving = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stopped.load(Ordering::Acquire) {
                    return;
                }
                let state = Arc::clone(&serving);
                thread::spawn(move || state.connection(stream.unwrap()));
            }
        });
        Self { address, state }
    }

    /// The image's reference.
    pub(crate) fn reference(&self) -> sluice_oci::Reference {
        format!("{}/app:v1", self.address).parse().unwrap()
    }

    /// Decides for each request from now on what goes wrong.
    pub(crate) fn misbehave(&self, decide: impl FnMut(&Request) -> Option<Fault> + Send + 'static) {
        *self.state.decide.lock() = Box::new(decide);
    }

    /// Requests since the last call.
    pub(crate) fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.log.lock())
    }

    /// How many requests came since the last call of `take_log`.
    pub(crate) fn requests(&self) -> usize {
        self.state.log.lock().len()
    }

    /// Blob requests since the last call, as ranges.
    pub(crate) fn take_ranges(&self) -> Vec<(u64, u64)> {
        let log = self.take_log();
        log.into_iter()
            .filter_map(|request| request.range)
            .collect()
    }

    /// Lets stalled answers go on.
    pub(crate) fn unstall(&self) {
        self.state.stalled.store(false, Ordering::Release);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::Release);
        self.unstall();
        let _ = TcpStream::connect(self.address);
    }
}

impl State {
    fn connection(&self, mut stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        while let Some((method, path, range)) = read_head(&mut reader) {
            let Ok(()) = self.answer(&mut stream, &method, &path, range) else {
                return;
            };
        }
    }

    fn answer(
        &self,
        stream: &mut TcpStream,
        method: &str,
        path: &str,
        range: Option<String>,
    ) -> std::io::Result<()> {
        // Whatever the repository.
        let mut parts = path.rsplit('/');
        let name = parts.next().unwrap_or_default();
        let kind = parts.next().unwrap_or_default();
        if kind == "manifests" && self.documents.contains_key(name) {
            let (media_type, bytes) = &self.documents[name];
            let request = Request {
                path: path.to_owned(),
                range: None,
            };
            let fault = (self.decide.lock())(&request);
            self.log.lock().push(request);
            if let Some(Fault::Status(status)) = fault {
                return head(stream, status, 0, "");
            }
            head(
                stream,
                200,
                bytes.len(),
                &format!("Content-Type: {media_type}\r\n"),
            )?;
            return match method {
                "HEAD" => Ok(()),
                _ => stream.write_all(bytes),
            };
        }
        let Some(blob) = self.blobs.get(name).filter(|_| kind == "blobs") else {
            return head(stream, 404, 0, "");
        };
        let total = blob.len() as u64;
        let (start, end) = range
            .as_deref()
            .map_or((0, total), |range| bounds(range, total));
        let request = Request {
            path: path.to_owned(),
            range: Some((start, end)),
        };
        let fault = (self.decide.lock())(&request);
        self.log.lock().push(request);
        if start >= total {
            return head(stream, 416, 0, "");
        }
        let mut bytes = blob[start as usize..end as usize].to_vec();
        let content_range = format!("Content-Range: bytes {start}-{}/{total}\r\n", end - 1);
        match fault {
            Some(Fault::Status(status)) => return head(stream, status, 0, ""),
            Some(Fault::IgnoreRange) => {
                head(stream, 200, blob.len(), "")?;
                return stream.write_all(blob);
            }
            Some(Fault::Tamper(at)) if (start..end).contains(&at) => {
                bytes[(at - start) as usize] ^= 1;
            }
            Some(Fault::Cut(len)) => {
                head(stream, 206, bytes.len(), &content_range)?;
                stream.write_all(&bytes[..len.min(bytes.len())])?;
                return Err(std::io::ErrorKind::BrokenPipe.into());
            }
            Some(Fault::Stall(len)) => {
                head(stream, 206, bytes.len(), &content_range)?;
                let len = len.min(bytes.len());
                stream.write_all(&bytes[..len])?;
                while self.stalled.load(Ordering::Acquire) {
                    thread::sleep(Duration::from_millis(5));
                }
                return stream.write_all(&bytes[len..]);
            }
            _ => {}
        }
        let status = if range.is_some() { 206 } else { 200 };
        head(stream, status, bytes.len(), &content_range)?;
        stream.write_all(&bytes)
    }
}

fn head(stream: &mut TcpStream, status: u16, len: usize, more: &str) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {len}\r\n{more}\r\n");
    stream.write_all(head.as_bytes())
}

/// Method, path and range of the next request of the connection.
fn read_head(reader: &mut impl BufRead) -> Option<(String, String, Option<String>)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&len| len > 0)?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut range = None;
    let mut body = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|&len| len > 0)?;
        let line = line.trim();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.trim().to_owned()),
            "content-length" => body = value.trim().parse().ok()?,
            _ => {}
        }
    }
    reader.take(body).read_to_end(&mut Vec::new()).ok()?;
    Some((method, path, range))
}

fn bounds(range: &str, total: u64) -> (u64, u64) {
    let (start, end) = range.trim_start_matches("bytes=").split_once('-').unwrap();
    match (start.parse::<u64>(), end.parse::<u64>()) {
        (Ok(start), Ok(last)) => (start, (last + 1).min(total)),
        (Ok(start), Err(_)) => (start, total),
        (Err(_), Ok(suffix)) => (total.saturating_sub(suffix), total),
        _ => panic!("{range}"),
    }
}
