//! A kernel that lacks something, as far as one program can tell.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// `mount(2)` with no flag but this is how EROFS is mounted, and nothing else.
const EROFS_FLAGS: u32 = libc::MS_RDONLY as u32;
/// Where `struct seccomp_data` has the number of the call, and the lower half
/// of its fourth argument.
const NUMBER: u32 = 0;
const FLAGS: u32 = 16 + 3 * 8;

/// Lets the kernel answer the program as one does that mounts EROFS from block
/// devices only: `ENOTBLK`. What else the program mounts, it mounts.
pub fn without_file_backed_erofs(command: &mut Command) -> &mut Command {
    let load = |at| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0);
    let unless = |value, skip| statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, skip);
    let answer = |with| statement(libc::BPF_RET | libc::BPF_K, with, 0);
    let mut filter = [
        load(NUMBER),
        unless(libc::SYS_mount as u32, 3),
        load(FLAGS),
        unless(EROFS_FLAGS, 1),
        answer(libc::SECCOMP_RET_ERRNO | libc::ENOTBLK as u32),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_mut_ptr(),
        };
        // SAFETY: the program and its instructions live through the call, which
        // copies them.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec, it makes one system call and neither
    // allocates nor locks.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(install)
    }
}

fn statement(code: u32, k: u32, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    }
}
