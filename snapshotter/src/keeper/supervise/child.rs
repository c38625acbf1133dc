//! Starting the daemon with the descriptors that are kept for it.

use std::ffi::{CString, OsStr, OsString, c_char};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::super::fdstore::{
    FDSTORE, FIRST_FD, LISTEN_FDNAMES, LISTEN_FDS, LISTEN_PID, MOST_FDS, NOTIFY_SOCKET, announce,
};
use super::inbox::Kept;
use super::{Error, Options};

/// Digits of the largest process number.
const PID_DIGITS: usize = 10;

/// A running daemon.
#[derive(Debug)]
pub(super) struct Child {
    pid: Pid,
    started: Instant,
    ready: bool,
}

impl Child {
    pub(super) fn start(options: &Options, inbox: &OsStr, kept: &Kept) -> Result<Self, Error> {
        let program = c_string(options.program.as_os_str().to_owned())?;
        let args = [options.program.as_os_str().to_owned()]
            .into_iter()
            .chain(options.args.iter().cloned())
            .map(c_string)
            .collect::<Result<Vec<_>, _>>()?;
        let (count, names) = announce(kept.names());
        let ours = [
            NOTIFY_SOCKET,
            FDSTORE,
            LISTEN_FDS,
            LISTEN_PID,
            LISTEN_FDNAMES,
        ];
        let inherited = std::env::vars_os().filter(|(name, _)| !ours.iter().any(|our| name == our));
        let environment = inherited
            .chain([
                (NOTIFY_SOCKET.into(), inbox.to_owned()),
                (FDSTORE.into(), MOST_FDS.to_string().into()),
                (LISTEN_FDS.into(), count.into()),
                (LISTEN_FDNAMES.into(), names.into()),
            ])
            .map(|(name, value)| {
                let mut line = name;
                line.push("=");
                line.push(value);
                c_string(line)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let fds: Vec<RawFd> = kept.fds().map(|fd| fd.as_raw_fd()).collect();
        let pid = spawn(&program, &args, &environment, &fds)
            .map_err(|error| Error::system("fork", error))?;
        Ok(Self {
            pid,
            started: Instant::now(),
            ready: false,
        })
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready
    }

    pub(super) fn set_ready(&mut self) {
        self.ready = true;
    }

    /// It is not reaped while this exists, so the number is its own.
    pub(super) fn signal(&self, signal: Signal) {
        if let Err(error) = rustix::process::kill_process(self.pid, signal) {
            tracing::warn!("cannot send a signal to process {}: {error}", self.pid);
        }
    }
}

fn c_string(text: OsString) -> Result<CString, Error> {
    CString::new(text.as_bytes()).map_err(|_| Error::Argument(OsString::from_vec(text.into_vec())))
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

/// Forks and runs the program with `fds` at [`FIRST_FD`] and up, all of which
/// are beyond those numbers now, and `LISTEN_PID` its own number, which is why
/// `std::process::Command` does not do.
#[allow(unsafe_code)]
fn spawn(
    program: &CString,
    args: &[CString],
    environment: &[CString],
    fds: &[RawFd],
) -> io::Result<Pid> {
    // All memory is had before the fork.
    let mut args = pointers(args);
    args.push(std::ptr::null());
    let mut listen_pid = format!("{LISTEN_PID}={:width$}\0", "", width = PID_DIGITS).into_bytes();
    let digits = LISTEN_PID.len() + 1;
    let mut environment = pointers(environment);
    environment.push(listen_pid.as_ptr().cast());
    environment.push(std::ptr::null());

    // SAFETY: the child calls nothing that is not async-signal-safe, and ends
    // in execve or _exit.
    let pid = unsafe { libc::fork() };
    if pid != 0 {
        return match pid {
            -1 => Err(io::Error::last_os_error()),
            pid => Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH)),
        };
    }
    // SAFETY: async-signal-safe calls on memory and descriptors of this
    // process, which is a copy; the arrays end with a null pointer and their
    // strings with a NUL.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        // A Ctrl-C at the terminal is for the supervisor alone.
        libc::setpgid(0, 0);
        for (place, fd) in (FIRST_FD..).zip(fds) {
            if libc::dup2(*fd, place) == -1 {
                libc::_exit(126);
            }
        }
        write_number(libc::getpid(), &mut listen_pid[digits..]);
        libc::execve(program.as_ptr(), args.as_ptr(), environment.as_ptr());
        let message = b"cannot run the program to supervise\n";
        libc::write(2, message.as_ptr().cast(), message.len());
        libc::_exit(127)
    }
}

/// In decimal, ended by a NUL.
fn write_number(number: i32, place: &mut [u8]) {
    let mut digits = [0; PID_DIGITS];
    let mut left = number.unsigned_abs();
    let mut count = 0;
    loop {
        digits[count] = b'0' + (left % 10) as u8;
        count += 1;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    for (to, digit) in place.iter_mut().zip(digits[..count].iter().rev()) {
        *to = *digit;
    }
    place[count] = 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_they_are_printed() {
        for number in [1, 9, 10, 4_194_304, i32::MAX] {
            let mut place = [b' '; PID_DIGITS + 1];
            write_number(number, &mut place);
            let text = std::ffi::CStr::from_bytes_until_nul(&place).unwrap();
            assert_eq!(text.to_str().unwrap(), number.to_string());
        }
    }
}
