//! What an element's author declares parameters with: [`crate::params!`], [`crate::words!`] and
//! [`crate::text_value!`].

use super::parse::shorten;
use super::suggest;
use super::value::{FilePath, Ref, Service};
use serde::de::{Deserializer, Error, Visitor};
use std::fmt::{self, Display};
use std::marker::PhantomData;
use std::str::FromStr;

/// What the table of parameters says of a type that a parameter can have.
pub trait ParamKind {
    /// In the words of the reference: `size`, `path`, `yes or no`.
    const KIND: &'static str;
    /// True if it takes any number of values.
    const LIST: bool = false;
    /// True if it must be given when it has no default.
    const REQUIRED: bool = true;
    /// The service of the element that it refers to.
    const REFERS: Option<&'static str> = None;
}

impl<T: ParamKind> ParamKind for Option<T> {
    const KIND: &'static str = T::KIND;
    const LIST: bool = T::LIST;
    const REQUIRED: bool = false;
    const REFERS: Option<&'static str> = T::REFERS;
}

impl<T: ParamKind> ParamKind for Vec<T> {
    const KIND: &'static str = T::KIND;
    const LIST: bool = true;
    const REQUIRED: bool = false;
    const REFERS: Option<&'static str> = T::REFERS;
}

impl<T: Service + ?Sized> ParamKind for Ref<T> {
    const KIND: &'static str = "element";
    const REFERS: Option<&'static str> = Some(T::NAME);
}

macro_rules! kinds {
    ($($type:ty: $kind:literal)*) => {$(
        impl ParamKind for $type {
            const KIND: &'static str = $kind;
        }
    )*};
}

kinds! {
    FilePath: "path"
    String: "text"
    bool: "yes or no"
    f64: "number"
    u8: "number" u16: "number" u32: "number" u64: "number" usize: "number"
    i8: "number" i16: "number" i32: "number" i64: "number"
}

/// Reads a text by [`FromStr`].
pub struct TextVisitor<T> {
    wanted: &'static str,
    value: PhantomData<fn() -> T>,
}

impl<T> TextVisitor<T> {
    /// `wanted` says what is expected: `a size`.
    pub fn new(wanted: &'static str) -> Self {
        TextVisitor { wanted, value: PhantomData }
    }
}

impl<'de, T: FromStr<Err: Display>> Visitor<'de> for TextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.wanted)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

/// Makes a type that has `FromStr` and `Display` one that a parameter can have:
/// `text_value!(Address, "address");`. Reading must accept what displaying writes, and an error should
/// say what was expected and what was found.
#[macro_export]
macro_rules! text_value {
    ($type:ty, $kind:literal) => {
        $crate::text_value!($type, $kind, "");
    };
    ($type:ty, $kind:literal, $tag:expr) => {
        impl $crate::lang::ParamKind for $type {
            const KIND: &'static str = $kind;
        }

        impl $crate::lang::macros::Serialize for $type {
            fn serialize<S: $crate::lang::macros::Serializer>(
                &self,
                serializer: S,
            ) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> $crate::lang::macros::Deserialize<'de> for $type {
            fn deserialize<D: $crate::lang::macros::Deserializer<'de>>(
                deserializer: D,
            ) -> Result<Self, D::Error> {
                let text = $crate::lang::macros::TextVisitor::new(concat!("a value of the kind ", $kind));
                deserializer.deserialize_newtype_struct($tag, text)
            }
        }
    };
}

/// Declares an enum whose variants are words of the graph language:
///
/// ```
/// blockmason::words! {
///     /// What a full disk does.
///     pub enum Full: "what to do" {
///         /// Requests wait.
///         Wait = "wait",
///         /// Requests fail.
///         Fail = "fail",
///     }
/// }
/// assert_eq!("wait".parse(), Ok(Full::Wait));
/// assert_eq!(Full::Fail.to_string(), "fail");
/// ```
///
/// Without `: "kind"` the reference lists the words themselves.
#[macro_export]
macro_rules! words {
    (@make ($kind:expr)
        $(#[$meta:meta])*
        $vis:vis enum $name:ident {
            $($(#[$variant_meta:meta])* $variant:ident = $word:literal),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        $vis enum $name {
            $($(#[$variant_meta])* $variant,)*
        }

        impl $name {
            const ALL: &'static [$name] = &[$($name::$variant),*];
            const WORDS: &'static [&'static str] = &[$($word),*];
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str(match self {
                    $($name::$variant => $word,)*
                })
            }
        }

        impl ::std::str::FromStr for $name {
            type Err = String;

            fn from_str(word: &str) -> Result<Self, String> {
                $crate::lang::macros::find_word(word, Self::WORDS).map(|index| Self::ALL[index])
            }
        }

        impl $crate::lang::ParamKind for $name {
            const KIND: &'static str = $kind;
        }

        impl $crate::lang::macros::Serialize for $name {
            fn serialize<S: $crate::lang::macros::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> $crate::lang::macros::Deserialize<'de> for $name {
            fn deserialize<D: $crate::lang::macros::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let word = $crate::lang::macros::WordVisitor(Self::WORDS);
                deserializer.deserialize_str(word).map(|index| Self::ALL[index])
            }
        }
    };
    (
        $(#[$meta:meta])*
        $vis:vis enum $name:ident: $kind:literal { $($body:tt)* }
    ) => {
        $crate::words! { @make ($kind) $(#[$meta])* $vis enum $name { $($body)* } }
    };
    (
        $(#[$meta:meta])*
        $vis:vis enum $name:ident {
            $(#[$first_meta:meta])* $first:ident = $first_word:literal
            $(, $(#[$variant_meta:meta])* $variant:ident = $word:literal)* $(,)?
        }
    ) => {
        $crate::words! { @make (concat!("`", $first_word, "`" $(, " or `", $word, "`")*))
            $(#[$meta])*
            $vis enum $name {
                $(#[$first_meta])* $first = $first_word
                $(, $(#[$variant_meta])* $variant = $word)*
            }
        }
    };
}

/// The place of a word in a list, or what was expected.
pub fn find_word(word: &str, words: &'static [&'static str]) -> Result<usize, String> {
    let place = words.iter().position(|known| *known == word);
    place.ok_or_else(|| {
        let words = suggest::list(words.iter().copied());
        format!("expected one of {words}, found `{}`", shorten(word))
    })
}

/// Reads one of these words and returns its index.
pub struct WordVisitor(pub &'static [&'static str]);

impl Visitor<'_> for WordVisitor {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "one of {}", suggest::list(self.0.iter().copied()))
    }

    fn visit_str<E: Error>(self, word: &str) -> Result<usize, E> {
        find_word(word, self.0).map_err(|_| E::unknown_variant(word, self.0))
    }
}

/// Declares the parameters of an element as a struct:
///
/// ```
/// use blockmason::lang::value::{FilePath, Size};
/// use blockmason::lang::Params;
///
/// blockmason::params! {
///     /// A file or a block device.
///     pub struct File {
///         /// The image.
///         path: FilePath,
///         /// Creates a sparse file of this size when it is missing.
///         size: Option<Size>,
///         /// Opens with O_DIRECT.
///         direct: bool = "no",
///     }
/// }
///
/// let params = Params::parse("example", "(path disk.img) (size 4k)", "/srv".as_ref()).unwrap();
/// let file = File::from(&params).unwrap();
/// assert_eq!(file.path.0, std::path::Path::new("/srv/disk.img"));
/// assert_eq!(file.size, Some(Size(4096)));
/// assert!(!file.direct);
/// assert_eq!(File::PARAMS[0].doc, "The image.");
/// ```
///
/// A parameter without a default must be given, unless it is an `Option` (absent) or a `Vec` (empty).
/// A default is written as in a graph file and read by the same code; that of a list has its values
/// separated by white space. The fields are as visible as the struct.
#[macro_export]
macro_rules! params {
    (@default) => { ::core::option::Option::<&'static str>::None };
    (@default $default:literal) => { ::core::option::Option::Some($default) };
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident {
            $($(#[doc = $doc:literal])* $field:ident: $type:ty $(= $default:literal)?),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, $crate::lang::macros::Deserialize)]
        #[serde(crate = "::blockmason::lang::macros::serde", deny_unknown_fields)]
        $vis struct $name {
            $($(#[doc = $doc])* $vis $field: $type,)*
        }

        impl $name {
            /// The table of the parameters, in the order of their declaration.
            $vis const PARAMS: &'static [$crate::describe::Param] = &[$(
                $crate::describe::Param {
                    name: stringify!($field),
                    kind: <$type as $crate::lang::ParamKind>::KIND,
                    doc: concat!($($doc),*).trim_ascii(),
                    default: $crate::params!(@default $($default)?),
                    required: <$type as $crate::lang::ParamKind>::REQUIRED
                        && $crate::params!(@default $($default)?).is_none(),
                    list: <$type as $crate::lang::ParamKind>::LIST,
                    refers: <$type as $crate::lang::ParamKind>::REFERS,
                }
            ),*];

            /// Reads the parameters of one element.
            ///
            /// # Errors
            /// Everything that is wrong with them.
            $vis fn from(
                params: &$crate::lang::Params,
            ) -> ::std::result::Result<Self, ::std::vec::Vec<$crate::lang::ParamError>> {
                params.deserialize_with(Self::PARAMS)
            }

            /// Reads the parameters and drops them again: [`blockmason::describe::ElementType::check`].
            ///
            /// # Errors
            /// Everything that is wrong with them.
            #[allow(dead_code)]
            $vis fn check(
                params: &$crate::lang::Params,
            ) -> ::std::result::Result<(), ::std::vec::Vec<$crate::lang::ParamError>> {
                Self::from(params).map(|_| ())
            }
        }
    };
}
