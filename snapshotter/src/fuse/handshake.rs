//! What the kernel and the file system agree on when a FUSE mount begins, kept
//! so that the next process can go on where this one ended.
//!
//! The kernel says INIT once in the life of a mount. `fuser` insists on one at
//! the beginning of every session, so a session is always given its INIT on a
//! socket, the kernel's own or the kept one, and the device takes the socket's
//! place afterwards.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use fuser::InitFlags;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Least size of the buffer that the kernel accepts for a request.
const REQUEST_BUFFER: usize = 8192;
const OPCODE_INIT: u32 = 26;

/// `struct fuse_in_header`, `struct fuse_init_in`.
const REQUEST_HEADER: usize = 40;
const REQUEST_FLAGS: usize = REQUEST_HEADER + 12;
const REQUEST_FLAGS2: usize = REQUEST_HEADER + 16;
/// `struct fuse_out_header`, `struct fuse_init_out`.
const REPLY_HEADER: usize = 16;
const REPLY_FLAGS: usize = REPLY_HEADER + 12;
const REPLY_FLAGS2: usize = REPLY_HEADER + 32;

/// `struct fuse_out_header` of a notification.
const NOTIFY_RESEND: i32 = 7;

/// The INIT of one mount: what the kernel offered, cut to what was taken, and
/// the answer that it got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreement {
    request: Vec<u8>,
    reply: Vec<u8>,
}

/// Why there is no agreement.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// A system call failed.
    #[error("the FUSE handshake failed: {0}")]
    Io(#[from] io::Error),
    /// The kernel or the kept state does not hold an INIT.
    #[error("{0} is no FUSE handshake")]
    Malformed(&'static str),
    /// The mount was begun by a program whose terms this one cannot keep.
    #[error(
        "the mount was begun on terms that this version does not support ({0:?}); start the \
         version that began it, or stop the containers and run `sluice-snapshotter cleanup`"
    )]
    Terms(InitFlags),
}

impl Agreement {
    /// Reads the kernel's INIT from a device that was just mounted, passes it
    /// to the session that `begin` makes of a descriptor, and gives the kernel
    /// the session's answer.
    pub(super) fn negotiate<S: AsFd>(
        device: BorrowedFd<'_>,
        begin: impl FnOnce(OwnedFd) -> io::Result<S>,
    ) -> Result<(Self, S), HandshakeError> {
        let mut device_file = std::fs::File::from(device.try_clone_to_owned()?);
        let mut buffer = vec![0; REQUEST_BUFFER];
        let len = loop {
            match device_file.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        buffer.truncate(len);
        let (reply, session) = greet(&buffer, begin)?;
        device_file.write_all(&reply)?;
        let mut agreement = Self {
            request: buffer,
            reply,
        };
        agreement.check()?;
        // What was not taken must not be taken by the next process either.
        let taken = agreement.terms().bits();
        agreement.set_request(REQUEST_FLAGS, taken as u32);
        agreement.set_request(REQUEST_FLAGS2, (taken >> 32) as u32);
        Ok((agreement, session))
    }

    /// Plays the INIT to the session that `begin` makes of a descriptor. The
    /// kernel hears nothing of it.
    pub(super) fn replay<S: AsFd>(
        &self,
        begin: impl FnOnce(OwnedFd) -> io::Result<S>,
    ) -> Result<S, HandshakeError> {
        let (reply, session) = greet(&self.request, begin)?;
        let now = Self {
            request: self.request.clone(),
            reply,
        };
        now.check()?;
        match self.terms() == now.terms() {
            true => Ok(session),
            false => Err(HandshakeError::Terms(self.terms() - now.terms())),
        }
    }

    /// The flags that both sides live by.
    pub fn terms(&self) -> InitFlags {
        let low = read_u32(&self.reply, REPLY_FLAGS).unwrap_or_default();
        let high = match InitFlags::from_bits_retain(low.into()).contains(InitFlags::FUSE_INIT_EXT)
        {
            true => read_u32(&self.reply, REPLY_FLAGS2).unwrap_or_default(),
            false => 0,
        };
        InitFlags::from_bits_retain(u64::from(high) << 32 | u64::from(low))
    }

    /// Whether the kernel can be asked to send again what was not answered.
    pub fn resends(&self) -> bool {
        self.terms().contains(InitFlags::FUSE_HAS_RESEND)
    }

    /// As bytes: the length of the request as a little-endian `u32`, the
    /// request, the reply.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = (self.request.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&self.request);
        bytes.extend_from_slice(&self.reply);
        bytes
    }

    /// From what [`Agreement::to_bytes`] made.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, HandshakeError> {
        let malformed = HandshakeError::Malformed("what was kept");
        let Some((len, rest)) = bytes.split_first_chunk() else {
            return Err(malformed);
        };
        let Some((request, reply)) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)
        else {
            return Err(malformed);
        };
        let agreement = Self {
            request: request.to_vec(),
            reply: reply.to_vec(),
        };
        agreement.check()?;
        Ok(agreement)
    }

    fn check(&self) -> Result<(), HandshakeError> {
        let request = read_u32(&self.request, 0) == Some(self.request.len() as u32)
            && read_u32(&self.request, 4) == Some(OPCODE_INIT)
            && read_u32(&self.request, REQUEST_FLAGS2).is_some();
        if !request {
            return Err(HandshakeError::Malformed("the kernel's first request"));
        }
        let reply = read_u32(&self.reply, 0) == Some(self.reply.len() as u32)
            && read_u32(&self.reply, 4) == Some(0)
            && read_u32(&self.reply, REPLY_FLAGS2).is_some();
        if !reply {
            return Err(HandshakeError::Malformed("the session's first answer"));
        }
        Ok(())
    }

    fn set_request(&mut self, at: usize, value: u32) {
        if let Some(field) = self.request.get_mut(at..at + 4) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
    }
}

/// Makes a session of one end of a socket that holds the request; returns its
/// answer and the session.
fn greet<S>(
    request: &[u8],
    begin: impl FnOnce(OwnedFd) -> io::Result<S>,
) -> Result<(Vec<u8>, S), HandshakeError> {
    // One message a read, as the device has it.
    let (kernel, session) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(io::Error::from)?;
    rustix::net::send(&kernel, request, SendFlags::NOSIGNAL).map_err(io::Error::from)?;
    let session = begin(session)?;
    let mut reply = vec![0; 256];
    let (_, len) =
        rustix::net::recv(&kernel, &mut reply[..], RecvFlags::DONTWAIT).map_err(io::Error::from)?;
    reply.truncate(len);
    Ok((reply, session))
}

/// Asks the kernel to send again what it has no answer to. Only while nobody
/// reads the device, or requests would be handled twice.
pub(super) fn resend(device: BorrowedFd<'_>) -> io::Result<()> {
    let mut header = (REPLY_HEADER as u32).to_ne_bytes().to_vec();
    header.extend_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    header.extend_from_slice(&0u64.to_ne_bytes());
    rustix::io::write(device, &header)?;
    Ok(())
}

/// Puts `device` in the place of a descriptor that a session owns.
#[allow(unsafe_code)]
pub(super) fn put_in_place(device: BorrowedFd<'_>, place: RawFd) -> io::Result<()> {
    // SAFETY: both descriptors are open, the caller holds the session that
    // owns the one that is replaced, and it goes on to own what is in its
    // place. A thread that reads it now goes on reading the old file.
    match unsafe { libc::dup3(device.as_raw_fd(), place, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}
