//! Keeping the allocator from keeping memory.

/// Blocks from this size on are mapped one by one and go back to the system
/// when they are freed.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 512 << 10;

/// Heaps that threads share. Each may keep some free memory.
#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 4;

/// Told nothing, glibc raises its threshold to the largest block that was ever
/// freed, and from then on keeps tens of megabytes for the next such block.
pub(super) fn settle() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` takes numbers only, and may be called at any time.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// Returns what is free now. A TOC of 100,000 entries takes a hundred
/// megabytes for a moment, in many small pieces.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` takes a number only, and may be called at any time
    // from any thread.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
}
