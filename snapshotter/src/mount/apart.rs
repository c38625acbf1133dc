//! `mount(2)` in a process of its own.
//!
//! A process that waits for an answer of its own FUSE mount cannot be killed:
//! the kernel waits for the answer, the threads that could give it are dead,
//! and as somebody else keeps the device open nothing ever ends the wait. The
//! next process could, but does not get to run before this one is gone. A child
//! that waits holds up nobody: the next process answers it.

use std::ffi::CStr;

use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// The lowest descriptor that the child closes.
const FIRST: libc::c_uint = 3;

/// As `mount(2)`. When this process is killed meanwhile, the mount may still
/// come to be, unless its mount point has been removed by then.
pub(super) fn mount(
    source: &CStr,
    target: &CStr,
    kind: &CStr,
    flags: MountFlags,
    options: &CStr,
) -> Result<(), Errno> {
    let child = fork(source, target, kind, flags, options)?;
    match wait(child)?.exit_status() {
        Some(0) => Ok(()),
        Some(errno) => Err(Errno::from_raw_os_error(errno)),
        None => Err(Errno::INTR),
    }
}

#[allow(unsafe_code)]
fn fork(
    source: &CStr,
    target: &CStr,
    kind: &CStr,
    flags: MountFlags,
    options: &CStr,
) -> Result<Pid, Errno> {
    // SAFETY: the child calls nothing that is not async-signal-safe, on memory
    // that was had before, and ends in _exit.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::AGAIN)),
        0 => {
            // SAFETY: as above; all strings end with a NUL. What this process
            // holds open must not be held by a child that outlives it: the
            // lock of the root directory, sockets, FUSE devices.
            unsafe {
                libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0);
                let mounted = libc::mount(
                    source.as_ptr(),
                    target.as_ptr(),
                    kind.as_ptr(),
                    flags.bits().into(),
                    options.as_ptr().cast(),
                );
                libc::_exit(match mounted {
                    0 => 0,
                    // An error number fits into an exit status.
                    _ => *libc::__errno_location(),
                })
            }
        }
        pid => Pid::from_raw(pid).ok_or(Errno::SRCH),
    }
}

fn wait(child: Pid) -> Result<WaitStatus, Errno> {
    loop {
        match rustix::process::waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => return Ok(status),
            Ok(None) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
