//! One error type for everything that can go wrong with a graph or a request.
//!
//! The kind says what the operator does next; the context says where it happened. An error is one
//! word wide, so that a [`crate::Reply`] stays small.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

pub use rustix::io::Errno;

/// What the operator does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request or the graph asks for something that cannot be: correct it. Guests see `EINVAL`.
    Invalid,
    /// The element or what lies below it does not do this operation. Guests see `EOPNOTSUPP`.
    Unsupported,
    /// Permission is missing, or the disk is read-only. Guests see `EPERM`.
    Denied,
    /// There is no room left below: free some. Guests see `ENOSPC`.
    NoSpace,
    /// Someone else holds it (a lock, a socket path): stop the other one. Guests see `EBUSY`.
    Busy,
    /// It is not there, or does not answer, now: bring it back, then try again. Guests see `EIO`.
    Unavailable,
    /// A device failed or data is damaged: look at the medium. Guests see `EIO`.
    Io,
    /// This program broke one of its own rules: report it. Guests see `EIO`.
    Internal,
}

impl Kind {
    /// The word of the control socket and of logs, `no_space`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Invalid => "invalid",
            Kind::Unsupported => "unsupported",
            Kind::Denied => "denied",
            Kind::NoSpace => "no_space",
            Kind::Busy => "busy",
            Kind::Unavailable => "unavailable",
            Kind::Io => "io",
            Kind::Internal => "internal",
        }
    }

    /// The errno a guest sees where the error carries no more exact one.
    pub fn errno(self) -> Errno {
        match self {
            Kind::Invalid => Errno::INVAL,
            Kind::Unsupported => Errno::OPNOTSUPP,
            Kind::Denied => Errno::PERM,
            Kind::NoSpace => Errno::NOSPC,
            Kind::Busy => Errno::BUSY,
            Kind::Unavailable | Kind::Io | Kind::Internal => Errno::IO,
        }
    }

    fn of_errno(errno: Errno) -> Kind {
        match errno {
            Errno::INVAL | Errno::OVERFLOW => Kind::Invalid,
            Errno::OPNOTSUPP | Errno::NOSYS => Kind::Unsupported,
            Errno::PERM | Errno::ACCESS | Errno::ROFS => Kind::Denied,
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Kind::NoSpace,
            Errno::BUSY | Errno::AGAIN | Errno::ADDRINUSE | Errno::EXIST => Kind::Busy,
            Errno::NOENT | Errno::CONNREFUSED | Errno::TIMEDOUT | Errno::NXIO | Errno::NODEV => {
                Kind::Unavailable
            }
            _ => Kind::Io,
        }
    }
}

/// An error with its context. Display prints the context and the message, never the source, which
/// [`std::error::Error::source`] gives.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    errno: Errno,
    message: Cow<'static, str>,
    element: Option<Box<str>>,
    operation: Option<&'static str>,
    offset: Option<u64>,
    path: Option<PathBuf>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`, with one sentence that an operator understands.
    #[cold]
    pub fn new(kind: Kind, message: impl Into<Cow<'static, str>>) -> Self {
        Error(Box::new(Inner {
            kind,
            errno: kind.errno(),
            message: message.into(),
            element: None,
            operation: None,
            offset: None,
            path: None,
            source: None,
        }))
    }

    /// [`Kind::Invalid`].
    #[cold]
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Kind::Invalid, message)
    }

    /// [`Kind::Unsupported`].
    #[cold]
    pub fn unsupported(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Kind::Unsupported, message)
    }

    /// [`Kind::Internal`].
    #[cold]
    pub fn internal(message: impl Into<Cow<'static, str>>) -> Self {
        Error::new(Kind::Internal, message)
    }

    /// An element was asked for a handler that it does not have, or not for that.
    #[cold]
    pub fn no_handler(handler: &str) -> Self {
        Error::invalid(format!("there is no handler {handler} for that"))
    }

    /// What a system call said. The kind follows from the errno.
    #[cold]
    pub fn os(errno: Errno, message: impl Into<Cow<'static, str>>) -> Self {
        let mut error = Error::new(Kind::of_errno(errno), message);
        error.0.errno = errno;
        error.0.source = Some(Box::new(std::io::Error::from(errno)));
        error
    }

    /// An I/O error of the standard library.
    #[cold]
    pub fn io(source: std::io::Error, message: impl Into<Cow<'static, str>>) -> Self {
        match source.raw_os_error() {
            Some(code) => Error::os(Errno::from_raw_os_error(code), message),
            None => {
                let kind = match source.kind() {
                    std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData => Kind::Invalid,
                    std::io::ErrorKind::NotFound
                    | std::io::ErrorKind::TimedOut
                    | std::io::ErrorKind::UnexpectedEof => Kind::Unavailable,
                    _ => Kind::Io,
                };
                Error::new(kind, message).with_source(source)
            }
        }
    }

    /// The errno that a guest is to see, where it is not the kind's own.
    pub fn with_errno(mut self, errno: Errno) -> Self {
        self.0.errno = errno;
        self
    }

    /// The element in which it happened. The first one that says so stays.
    pub fn in_element(mut self, name: &str) -> Self {
        self.0.element.get_or_insert_with(|| name.into());
        self
    }

    /// The operation and its byte offset. The first ones stay.
    pub fn at(mut self, operation: &'static str, offset: u64) -> Self {
        if self.0.operation.is_none() {
            self.0.operation = Some(operation);
            self.0.offset = Some(offset);
        }
        self
    }

    /// The file it is about.
    pub fn with_path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path = Some(path.as_ref().to_owned());
        self
    }

    /// The error that caused it.
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What the operator does next.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What the guest sees.
    pub fn errno(&self) -> Errno {
        self.0.errno
    }

    /// The sentence, without context.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The element in which it happened, if that is known.
    pub fn element(&self) -> Option<&str> {
        self.0.element.as_deref()
    }
}

impl Clone for Error {
    /// A copy for a second receiver; the source is kept as its text.
    fn clone(&self) -> Self {
        let inner = &*self.0;
        Error(Box::new(Inner {
            kind: inner.kind,
            errno: inner.errno,
            message: inner.message.clone(),
            element: inner.element.clone(),
            operation: inner.operation,
            offset: inner.offset,
            path: inner.path.clone(),
            source: inner.source.as_ref().map(|source| source.to_string().into()),
        }))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        if let Some(element) = &inner.element {
            write!(f, "{element}: ")?;
        }
        if let Some(operation) = inner.operation {
            write!(f, "{operation} ")?;
            match inner.offset {
                Some(offset) => write!(f, "at {offset}: ")?,
                None => write!(f, ": ")?,
            }
        }
        if let Some(path) = &inner.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&inner.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} [{:?}, {:?}]", self.0.kind, self.0.errno)?;
        match &self.0.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Error::os(errno, "the system refused it")
    }
}
