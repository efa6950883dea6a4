//! TLS between our client and our server, and against those who try to get around it.

use super::client::{self, ClientTls, Wanted};
use super::handshake::HandshakeError;
use super::meta::{ALLOCATION, encode_queries};
use super::server::tests::Shelf;
use super::server::{self, Negotiated, TlsPolicy};
use super::tls::{ClientCertificates, client_identity, server_config};
use super::wire::{
    MAGIC_INIT, MAGIC_OPTION, OptionCode, OptionHeader, OptionReply, ReplyCode, ReplyStyle,
    decode_option_reply, encode_option, encode_option_reply,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use std::path::Path;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

/// A folder with an authority and the certificates of a server, `localhost`, and of a client.
pub(super) fn certificates() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "test authority");
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
    write("ca-cert.pem", authority.pem());
    for (side, host) in [("server", "localhost"), ("client", "client.example")] {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, host);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        write(&format!("{side}-cert.pem"), certificate.pem());
        write(&format!("{side}-key.pem"), key.serialize_pem());
    }
    folder
}

fn required(folder: &Path) -> TlsPolicy {
    TlsPolicy::Required(server_config(folder, ClientCertificates::None).unwrap())
}

fn offered(folder: &Path) -> TlsPolicy {
    TlsPolicy::Offered(server_config(folder, ClientCertificates::None).unwrap())
}

fn wanted(tls: ClientTls) -> Wanted<'static> {
    Wanted { export: "disk", style: ReplyStyle::Extended, contexts: &[ALLOCATION], tls }
}

type Served = Result<Option<Negotiated<DuplexStream, u32>>, HandshakeError>;

/// Our client meets our server.
async fn meet(
    policy: &TlsPolicy,
    tls: ClientTls,
) -> (Result<client::Server<DuplexStream>, HandshakeError>, Served) {
    let (near, far) = duplex(1 << 16);
    let shelf = Shelf::default();
    let wanted = wanted(tls);
    tokio::join!(client::connect(near, &wanted), server::negotiate(far, &shelf, policy))
}

#[tokio::test]
async fn client_and_server_agree_under_tls() {
    let folder = certificates();
    let identity = client_identity(folder.path(), "localhost").unwrap();
    for policy in [required(folder.path()), offered(folder.path())] {
        for tls in [ClientTls::Required(identity.clone()), ClientTls::IfOffered(identity.clone())] {
            let (client, server) = meet(&policy, tls).await;
            let (mut client, mut server) = (client.unwrap(), server.unwrap().unwrap());
            assert!(client.stream.is_tls() && server.stream.is_tls());
            assert_eq!((client.style, server.style), (ReplyStyle::Extended, ReplyStyle::Extended));
            assert_eq!(client.contexts, server.contexts);
            assert_eq!(client.contexts.len(), 1);
            let mut heard = [0; 5];
            let talk = async {
                client.stream.write_all(b"hello").await.unwrap();
                client.stream.flush().await.unwrap();
            };
            let (_, read) = tokio::join!(talk, server.stream.read_exact(&mut heard));
            read.unwrap();
            assert_eq!(&heard, b"hello");
        }
    }
}

#[tokio::test]
async fn a_client_without_tls_goes_where_the_server_lets_it() {
    let folder = certificates();
    let identity = client_identity(folder.path(), "localhost").unwrap();
    let (client, _) = meet(&required(folder.path()), ClientTls::Off).await;
    let code = ReplyCode::ERR_TLS_REQD;
    assert!(matches!(client, Err(HandshakeError::Refused { code: heard, .. }) if heard == code));
    let (client, _) = meet(&offered(folder.path()), ClientTls::Off).await;
    assert!(!client.unwrap().stream.is_tls());
    let (client, _) = meet(&TlsPolicy::Off, ClientTls::IfOffered(identity.clone())).await;
    assert!(!client.unwrap().stream.is_tls());
    let (client, server) = meet(&TlsPolicy::Off, ClientTls::Required(identity)).await;
    let code = ReplyCode::ERR_POLICY;
    assert!(matches!(client, Err(HandshakeError::Refused { code: heard, .. }) if heard == code));
    assert!(server.unwrap().is_none(), "the client leaves politely");
}

#[tokio::test]
async fn the_wrong_name_or_authority_ends_it() {
    let (folder, other) = (certificates(), certificates());
    for identity in [client_identity(folder.path(), "elsewhere"), client_identity(other.path(), "localhost")]
    {
        let tls = ClientTls::IfOffered(identity.unwrap());
        let (client, server) = meet(&offered(folder.path()), tls).await;
        assert!(matches!(client, Err(HandshakeError::Tls(_))), "no way back to plain");
        assert!(server.is_err());
    }
}

#[tokio::test]
async fn clients_show_certificates_where_they_must() {
    let (folder, other, bare) = (certificates(), certificates(), tempfile::tempdir().unwrap());
    std::fs::copy(folder.path().join("ca-cert.pem"), bare.path().join("ca-cert.pem")).unwrap();
    std::fs::copy(folder.path().join("ca-cert.pem"), other.path().join("ca-cert.pem")).unwrap();
    let good = client_identity(folder.path(), "localhost").unwrap();
    let nobody = client_identity(bare.path(), "localhost").unwrap();
    let stranger = client_identity(other.path(), "localhost").unwrap();
    let cases = [
        (ClientCertificates::None, &nobody, true),
        (ClientCertificates::None, &stranger, true),
        (ClientCertificates::Optional, &nobody, true),
        (ClientCertificates::Optional, &good, true),
        (ClientCertificates::Optional, &stranger, false),
        (ClientCertificates::Required, &nobody, false),
        (ClientCertificates::Required, &good, true),
        (ClientCertificates::Required, &stranger, false),
    ];
    for (clients, identity, passes) in cases {
        let policy = TlsPolicy::Required(server_config(folder.path(), clients).unwrap());
        let (client, server) = meet(&policy, ClientTls::Required(identity.clone())).await;
        assert_eq!(server.is_ok(), passes, "{clients:?}");
        assert_eq!(client.is_ok(), passes, "{clients:?}");
    }
}

fn option(option: OptionCode, data: &[u8]) -> Vec<u8> {
    [&encode_option(&OptionHeader { option, len: data.len() as u32 })[..], data].concat()
}

/// Sends options on a stream and reads as many final replies.
async fn ask<S>(stream: &mut S, options: &[Vec<u8>]) -> Vec<ReplyCode>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut codes = Vec::new();
    for bytes in options {
        stream.write_all(bytes).await.unwrap();
        stream.flush().await.unwrap();
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header).await.unwrap();
            let OptionReply { code, len, .. } = decode_option_reply(&header).unwrap();
            stream.read_exact(&mut vec![0; len as usize]).await.unwrap();
            if code == ReplyCode::ACK || code.is_error() {
                codes.push(code);
                break;
            }
        }
    }
    codes
}

async fn greet(stream: &mut DuplexStream, flags: u32) {
    stream.read_exact(&mut [0; 18]).await.unwrap();
    stream.write_all(&flags.to_be_bytes()).await.unwrap();
}

fn go_data() -> Vec<u8> {
    b"\0\0\0\x04disk\0\0".to_vec()
}

#[tokio::test]
async fn a_locked_server_answers_nothing_else() {
    let folder = certificates();
    let policy = required(folder.path());
    let shelf = Shelf::default();
    let (mut near, far) = duplex(1 << 16);
    let talk = async {
        greet(&mut near, 3).await;
        let options = [
            option(OptionCode::LIST, &[]),
            option(OptionCode::INFO, &go_data()),
            option(OptionCode::GO, &go_data()),
            option(OptionCode(4711), b"unknown"),
            option(OptionCode::STRUCTURED_REPLY, b"malformed"),
            option(OptionCode::STARTTLS, b"malformed"),
            option(OptionCode::ABORT, &[]),
        ];
        ask(&mut near, &options).await
    };
    let (codes, served) = tokio::join!(talk, server::negotiate(far, &shelf, &policy));
    let mut expected = vec![ReplyCode::ERR_TLS_REQD; 5];
    expected.extend([ReplyCode::ERR_INVALID, ReplyCode::ACK]);
    assert_eq!(codes, expected);
    assert!(served.unwrap().is_none());
    for flags in [0, 3] {
        let (mut near, far) = duplex(1 << 16);
        let talk = async {
            greet(&mut near, flags).await;
            near.write_all(&option(OptionCode::EXPORT_NAME, b"disk")).await.unwrap();
            let mut heard = Vec::new();
            near.read_to_end(&mut heard).await.unwrap();
            assert!(heard.is_empty());
        };
        let ((), served) = tokio::join!(talk, server::negotiate(far, &shelf, &policy));
        assert!(matches!(served, Err(HandshakeError::Protocol(_))));
    }
}

#[tokio::test]
async fn starttls_forgets_everything_before_it() {
    let folder = certificates();
    let policy = offered(folder.path());
    let identity = client_identity(folder.path(), "localhost").unwrap();
    let shelf = Shelf::default();
    let (mut near, far) = duplex(1 << 16);
    let talk = async {
        greet(&mut near, 3).await;
        let context = encode_queries("disk", &[ALLOCATION]);
        let options = [
            option(OptionCode::EXTENDED_HEADERS, &[]),
            option(OptionCode::SET_META_CONTEXT, &context),
            option(OptionCode::STARTTLS, &[]),
        ];
        assert_eq!(ask(&mut near, &options).await, [ReplyCode::ACK; 3]);
        let connector = tokio_rustls::TlsConnector::from(identity.config);
        let mut secure = connector.connect(identity.name, near).await.unwrap();
        let options = [
            option(OptionCode::STARTTLS, &[]),
            option(OptionCode::SET_META_CONTEXT, &context),
            option(OptionCode::GO, &go_data()),
        ];
        let codes = ask(&mut secure, &options).await;
        assert_eq!(codes, [ReplyCode::ERR_INVALID, ReplyCode::ERR_INVALID, ReplyCode::ACK]);
    };
    let ((), served) = tokio::join!(talk, server::negotiate(far, &shelf, &policy));
    let negotiated = served.unwrap().unwrap();
    assert_eq!(negotiated.style, ReplyStyle::Simple);
    assert!(negotiated.contexts.is_empty());
}

/// Whoever sits in between can put options behind STARTTLS; they must not count as said under TLS.
#[tokio::test]
async fn plaintext_behind_starttls_ends_it() {
    let folder = certificates();
    let policy = required(folder.path());
    let shelf = Shelf::default();
    let (mut near, far) = duplex(1 << 16);
    let talk = async {
        greet(&mut near, 3).await;
        let bytes = [option(OptionCode::STARTTLS, &[]), option(OptionCode::GO, &go_data())].concat();
        near.write_all(&bytes).await.unwrap();
        let mut heard = Vec::new();
        near.read_to_end(&mut heard).await.unwrap();
        heard
    };
    let (heard, served) = tokio::join!(talk, server::negotiate(far, &shelf, &policy));
    assert!(matches!(served, Err(HandshakeError::Tls(_))), "{served:?}");
    let ack = OptionReply { option: OptionCode::STARTTLS, code: ReplyCode::ACK, len: 0 };
    assert_eq!(heard[..20], encode_option_reply(&ack));
}

/// The same in the other direction: replies slipped in behind the acknowledgement.
#[tokio::test]
async fn plaintext_behind_the_acknowledgement_ends_it() {
    let folder = certificates();
    let identity = client_identity(folder.path(), "localhost").unwrap();
    let (near, mut far) = duplex(1 << 16);
    let ack = |option| encode_option_reply(&OptionReply { option, code: ReplyCode::ACK, len: 0 });
    let mut bytes = [MAGIC_INIT.to_be_bytes(), MAGIC_OPTION.to_be_bytes()].concat();
    bytes.extend([0, 3]);
    bytes.extend(ack(OptionCode::STARTTLS));
    bytes.extend(ack(OptionCode::EXTENDED_HEADERS));
    far.write_all(&bytes).await.unwrap();
    let connected = client::connect(near, &wanted(ClientTls::Required(identity))).await;
    assert!(matches!(connected, Err(HandshakeError::Tls(_))), "{connected:?}");
}

#[test]
fn errors_name_the_file() {
    let folder = certificates();
    let path = |name: &str| folder.path().join(name);
    let server = || server_config(folder.path(), ClientCertificates::Required).map(drop);
    let client = || client_identity(folder.path(), "localhost").map(drop);
    let assert_named = |result: blockmason::Result<()>, name: &str| {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(name), "{text}");
    };
    std::fs::rename(path("client-key.pem"), path("away")).unwrap();
    assert_named(client(), "client-key.pem");
    std::fs::write(path("server-key.pem"), "nothing").unwrap();
    assert_named(server(), "server-key.pem");
    std::fs::copy(path("away"), path("server-key.pem")).unwrap();
    assert_named(server(), "server-cert.pem");
    std::fs::write(path("server-cert.pem"), "").unwrap();
    assert_named(server(), "server-cert.pem");
    std::fs::write(path("ca-cert.pem"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    assert_named(server(), "ca-cert.pem");
    std::fs::remove_file(path("ca-cert.pem")).unwrap();
    assert_named(client(), "ca-cert.pem");
    let fresh = certificates();
    let text = client_identity(fresh.path(), "no host!").unwrap_err().to_string();
    assert!(text.contains("no host!"), "{text}");
}
