//! Bytes that arrive, as a reader for a thread that blocks.

use std::io::{self, BufRead, Read};

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;

use super::Permit;

/// Bytes that arrived, and their part of the memory budget.
pub(super) type Arrived = (Bytes, Permit);

/// Ranges as one reader, for a thread that blocks.
pub(super) struct Incoming {
    receiver: mpsc::Receiver<Arrived>,
    current: Option<Arrived>,
}

impl Incoming {
    pub(super) fn new(receiver: mpsc::Receiver<Arrived>) -> Self {
        Self {
            receiver,
            current: None,
        }
    }
}

impl BufRead for Incoming {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self
            .current
            .as_ref()
            .is_none_or(|(bytes, _)| bytes.is_empty())
        {
            // Its memory is free now.
            self.current = None;
            match self.receiver.blocking_recv() {
                Some(next) => self.current = Some(next),
                None => return Ok(&[]),
            }
        }
        Ok(self.current.as_ref().map_or(&[], |(bytes, _)| bytes))
    }

    fn consume(&mut self, count: usize) {
        if let Some((bytes, _)) = &mut self.current {
            bytes.advance(count.min(bytes.len()));
        }
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}
