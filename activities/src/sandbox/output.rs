//! The output of a run: hashed whole, its end kept.

use sha2::{Digest, Sha256};
use std::io::{PipeReader, Read};
use tokio::sync::oneshot;

/// What was read.
pub(super) struct Log {
    pub(super) tail: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

/// Reads to the end. Says once through `stop` when more than `most` bytes came.
pub(super) fn read(mut from: PipeReader, tail_bytes: usize, most: u64, stop: oneshot::Sender<()>) -> Log {
    let mut hash = Sha256::new();
    let mut tail: Vec<u8> = Vec::new();
    let (mut bytes, mut stop, mut cut) = (0u64, Some(stop), false);
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let piece = &buffer[..n];
        hash.update(piece);
        bytes += n as u64;
        tail.extend_from_slice(piece);
        if tail.len() > 2 * tail_bytes {
            cut = true;
            tail.drain(..tail.len() - tail_bytes);
        }
        if bytes > most
            && let Some(stop) = stop.take()
        {
            // Nobody listens any more when the run has just ended by itself.
            let _ = stop.send(());
        }
    }
    if tail.len() > tail_bytes {
        cut = true;
        tail.drain(..tail.len() - tail_bytes);
    }
    // Postgres takes no NUL in text or JSON.
    let text = String::from_utf8_lossy(&tail).replace('\0', "\u{2400}");
    let tail = if cut { format!("… (cut)\n{}", text.trim_start_matches('\u{fffd}')) } else { text };
    Log { tail, bytes, sha256: hash.finalize().iter().map(|b| format!("{b:02x}")).collect() }
}
