//! An archive of many runs as a file: gzip over JSON lines.
//!
//! # Shape
//! First `archive` with what it is, then every run as `run export` writes it ([`crate::archive`]: `header` to `end`), then
//! `archived` with their number and the SHA-256 of all lines before it, line ends included. `zcat` shows it; the lines of one
//! run are a file for `run import` and `run replay`.

use crate::{
    Error, Result,
    archive::{Archive, BYTES_MAX, LINE_BYTES_MAX},
    store::retention::File as Made,
};
use chrono::{DateTime, Utc};
use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};
use uuid::Uuid;

/// Number of this format. A changed meaning is a new number.
pub const FORMAT: u32 = 1;
/// How the last line of a run begins.
const END: &str = "{\"end\":";

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Title {
    pub format: u32,
    pub id: Uuid,
    /// Its runs had closed before.
    pub closed_before: DateTime<Utc>,
    pub made_at: DateTime<Utc>,
}

/// The last line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Tail {
    runs: u64,
    /// Hex.
    sha256: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Archive(Title),
    Archived(Tail),
}

fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

fn unwritable(folder: &Path, error: &io::Error) -> Error {
    Error::ArchiveUnwritable(format!("{}: {error}", folder.display()))
}

/// What goes to the disk, with its sum.
struct Summed {
    out: BufWriter<File>,
    digest: Sha256,
    bytes: u64,
}

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.digest.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// An archive that is being written, under a name that says so. Dropped before its end, it is removed.
pub(crate) struct Writer {
    id: Uuid,
    folder: PathBuf,
    name: String,
    out: Option<GzEncoder<Summed>>,
    digest: Sha256,
    runs: u64,
}

impl Writer {
    /// # Errors
    /// `archive_unwritable`.
    pub(crate) fn create(folder: &Path, title: &Title) -> Result<Self> {
        let failed = |e| unwritable(folder, &e);
        fs::create_dir_all(folder).map_err(failed)?;
        let name = format!("runs-{}-{}.jsonl.gz", title.made_at.format("%Y%m%d"), title.id.simple());
        let mut writer =
            Self { id: title.id, folder: folder.to_owned(), name, out: None, digest: Sha256::new(), runs: 0 };
        // Runs hold what people have written.
        let file = File::options().write(true).create_new(true).mode(0o600).open(writer.temporary()).map_err(failed)?;
        let out = Summed { out: BufWriter::new(file), digest: Sha256::new(), bytes: 0 };
        writer.out = Some(GzEncoder::new(out, Compression::default()));
        writer.line(&Line::Archive(title.clone()))?;
        Ok(writer)
    }

    fn temporary(&self) -> PathBuf {
        self.folder.join(format!("{}.part", self.name))
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        let text = serde_json::to_string(line).map_err(|e| Error::Invariant(e.to_string()))?;
        self.text(&format!("{text}\n"))
    }

    fn text(&mut self, text: &str) -> Result<()> {
        self.digest.update(text.as_bytes());
        let Some(out) = &mut self.out else { return Err(Error::Invariant("the archive has ended".into())) };
        out.write_all(text.as_bytes()).map_err(|e| unwritable(&self.folder, &e))
    }

    /// # Errors
    /// `archive_unwritable`, for example if the disk is full.
    pub(crate) fn add(&mut self, run: &str) -> Result<()> {
        self.text(run)?;
        self.runs += 1;
        Ok(())
    }

    /// Ends it and puts it into its place: after a power failure it is there, whole.
    ///
    /// # Errors
    /// `archive_unwritable`.
    pub(crate) fn finish(mut self) -> Result<Made> {
        let tail = Tail { runs: self.runs, sha256: hex(self.digest.clone()) };
        self.line(&Line::Archived(tail))?;
        let Some(out) = self.out.take() else { return Err(Error::Invariant("the archive has ended".into())) };
        let sealed = || -> io::Result<Made> {
            let mut out = out.finish()?;
            out.flush()?;
            out.out.get_ref().sync_all()?;
            fs::rename(self.temporary(), self.folder.join(&self.name))?;
            File::open(&self.folder)?.sync_all()?;
            Ok(Made { id: self.id, name: self.name.clone(), sha256: out.digest.finalize().into(), bytes: out.bytes })
        };
        sealed().map_err(|e| unwritable(&self.folder, &e))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Under its last name it stays; there it is none's to remove any more.
        let _ = fs::remove_file(self.temporary());
    }
}

/// Reads an archive, a run at a time.
pub(crate) struct Reader<R> {
    input: R,
    digest: Sha256,
    number: u64,
    runs: u64,
}

impl Reader<BufReader<MultiGzDecoder<BufReader<File>>>> {
    /// # Errors
    /// `archive_invalid`.
    pub(crate) fn open(path: &Path) -> Result<(Self, Title)> {
        let file = File::open(path)
            .map_err(|e| Error::ArchiveInvalid { line: 0, why: format!("{} cannot be read: {e}", path.display()) })?;
        Self::new(BufReader::new(MultiGzDecoder::new(BufReader::new(file))))
    }
}

impl<R: BufRead> Reader<R> {
    fn new(input: R) -> Result<(Self, Title)> {
        let mut reader = Self { input, digest: Sha256::new(), number: 0, runs: 0 };
        let first = reader.line()?;
        let title = match serde_json::from_str(&first) {
            Ok(Line::Archive(title)) if title.format <= FORMAT => title,
            Ok(Line::Archive(title)) => {
                let why = format!("format {}, this program knows up to {FORMAT}: use a newer release", title.format);
                return Err(reader.invalid(why));
            }
            Ok(Line::Archived(_)) | Err(_) => {
                return Err(reader.invalid("not an archive of retired runs; one run is read by `run import`"));
            }
        };
        reader.digest.update(first.as_bytes());
        Ok((reader, title))
    }

    fn invalid(&self, why: impl Into<String>) -> Error {
        Error::ArchiveInvalid { line: self.number, why: why.into() }
    }

    fn line(&mut self) -> Result<String> {
        self.number += 1;
        let mut line = Vec::new();
        let read = Read::take(&mut self.input, LINE_BYTES_MAX + 1).read_until(b'\n', &mut line);
        read.map_err(|e| self.invalid(format!("cannot be read: {e}")))?;
        if line.len() as u64 > LINE_BYTES_MAX {
            return Err(self.invalid(format!("longer than {LINE_BYTES_MAX} bytes")));
        }
        if !line.ends_with(b"\n") {
            return Err(self.invalid("the file ends before its last line: it is cut off"));
        }
        String::from_utf8(line).map_err(|_| self.invalid("not text"))
    }

    /// The lines of the next run; `None` after the last, when the sum of all lines was found to be right.
    ///
    /// # Errors
    /// `archive_invalid`.
    pub(crate) fn next(&mut self) -> Result<Option<String>> {
        let mut run = String::new();
        loop {
            let line = self.line()?;
            if run.is_empty()
                && let Ok(Line::Archived(tail)) = serde_json::from_str(&line)
            {
                if tail != (Tail { runs: self.runs, sha256: hex(self.digest.clone()) }) {
                    return Err(self.invalid("the number or the sum differs: the file was changed or is damaged"));
                }
                return match self.input.fill_buf().map(<[u8]>::is_empty) {
                    Ok(true) => Ok(None),
                    Ok(false) => Err(self.invalid("something follows the last line")),
                    Err(error) => Err(self.invalid(format!("cannot be read: {error}"))),
                };
            }
            self.digest.update(line.as_bytes());
            run.push_str(&line);
            if run.len() as u64 > BYTES_MAX {
                return Err(self.invalid(format!("a run of more than {BYTES_MAX} bytes")));
            }
            if line.starts_with(END) {
                self.runs += 1;
                return Ok(Some(run));
            }
        }
    }
}

/// The SHA-256 of a file.
///
/// # Errors
/// `archive_invalid` if it cannot be read.
pub(crate) fn sum(path: &Path) -> Result<[u8; 32]> {
    let failed = |e: io::Error| Error::ArchiveInvalid { line: 0, why: format!("{}: {e}", path.display()) };
    let mut digest = Sha256::new();
    let mut file = File::open(path).map_err(failed)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(digest.finalize().into()),
            n => digest.update(&buffer[..n]),
        }
    }
}

/// Whether these lines are a run that can be imported again.
pub(crate) fn fit(run: &str) -> Result<Archive> {
    let archive = Archive::read(run.as_bytes())?;
    crate::archive::check::check(&archive)?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn title() -> Title {
        Title { format: FORMAT, id: Uuid::now_v7(), closed_before: Utc::now(), made_at: Utc::now() }
    }

    fn all(text: &str) -> Result<Vec<String>> {
        let (mut reader, _) = Reader::new(text.as_bytes())?;
        let mut runs = Vec::new();
        while let Some(run) = reader.next()? {
            runs.push(run);
        }
        Ok(runs)
    }

    const RUNS: [&str; 2] =
        ["{\"header\":1}\n{\"end\":{}}\n", "{\"header\":2}\n{\"history\":{\"end\":1}}\n{\"end\":{}}\n"];

    #[test]
    fn what_is_written_is_read_and_every_change_is_noticed() {
        let folder = std::env::temp_dir().join(format!("loopwright-archive-{}", Uuid::now_v7().simple()));
        let title = title();
        let mut writer = Writer::create(&folder, &title).expect("folder");
        RUNS.iter().for_each(|run| writer.add(run).expect("written"));
        let made = writer.finish().expect("whole");
        let path = folder.join(&made.name);
        assert_eq!((sum(&path).expect("file"), fs::metadata(&path).expect("file").len()), (made.sha256, made.bytes));
        let (mut reader, read) = Reader::open(&path).expect("archive");
        assert_eq!(read, title);
        for run in RUNS {
            assert_eq!(reader.next().expect("run").as_deref(), Some(run));
        }
        assert_eq!(reader.next().expect("end"), None);

        let mut text = String::new();
        MultiGzDecoder::new(File::open(&path).expect("file")).read_to_string(&mut text).expect("text");
        assert_eq!(all(&text).expect("whole").len(), 2);
        for (damage, what) in [
            (text.replace("\"header\":2", "\"header\":3"), "sum differs"),
            (text.replace(RUNS[0], ""), "sum differs"),
            (text[..text.len() - 9].to_owned(), "cut off"),
            (format!("{text}more"), "follows"),
            (text.replace("\"format\":1", "\"format\":9"), "newer release"),
            (RUNS[0].to_owned(), "run import"),
            (String::new(), "cut off"),
        ] {
            let error = all(&damage).expect_err(what);
            assert!(error.code() == "archive_invalid" && error.to_string().contains(what), "{what}: {error}");
        }

        // One that is given up leaves nothing.
        drop(Writer::create(&folder, &self::title()).expect("folder"));
        assert_eq!(fs::read_dir(&folder).expect("folder").count(), 1);
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let Err(error) = Writer::create(Path::new("/proc/nowhere"), &title()) else { panic!("written") };
        assert!(error.code() == "archive_unwritable" && error.to_string().contains("/proc/nowhere"), "{error}");
        // A disk that is full.
        let mut writer = Writer::create(&std::env::temp_dir(), &title()).expect("folder");
        let full = File::options().write(true).open("/dev/full").expect("device");
        let out = Summed { out: BufWriter::new(full), digest: Sha256::new(), bytes: 0 };
        writer.out = Some(GzEncoder::new(out, Compression::default()));
        writer.add(RUNS[0]).expect("buffered");
        let temporary = writer.temporary();
        assert_eq!(writer.finish().expect_err("full").code(), "archive_unwritable");
        assert!(!temporary.exists());
    }
}
