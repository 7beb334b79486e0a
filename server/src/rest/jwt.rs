//! The crypto of tokens, on ring: the one backend of this program.

use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind, EncodingKey,
    crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils},
    errors::{ErrorKind, Result},
    signature::{Error as SignatureError, Signer, Verifier},
};
use ring::{hmac, signature};

/// Installs the backend for tokens and the one for TLS. Every entry into the program calls it first; more often does
/// no harm.
pub fn install_crypto() {
    static PROVIDER: CryptoProvider =
        CryptoProvider { signer_factory: signer, verifier_factory: verifier, key_utils: KeyUtils::new_unimplemented() };
    // Refused when already installed, by us.
    let _ = PROVIDER.install_default();
    let _ = rustls::crypto::ring::default_provider().install_default();
}

struct Hmac(hmac::Key);

impl Signer<Vec<u8>> for Hmac {
    fn try_sign(&self, message: &[u8]) -> std::result::Result<Vec<u8>, SignatureError> {
        Ok(hmac::sign(&self.0, message).as_ref().to_vec())
    }
}
impl JwtSigner for Hmac {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}
impl Verifier<Vec<u8>> for Hmac {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> std::result::Result<(), SignatureError> {
        hmac::verify(&self.0, message, signature).map_err(|_| SignatureError::new())
    }
}
impl JwtVerifier for Hmac {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

struct Public {
    algorithm: Algorithm,
    key: signature::UnparsedPublicKey<Vec<u8>>,
}

impl Verifier<Vec<u8>> for Public {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> std::result::Result<(), SignatureError> {
        self.key.verify(message, signature).map_err(|_| SignatureError::new())
    }
}
impl JwtVerifier for Public {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

/// An RSA key as a JWKS writes it.
struct Rsa(signature::RsaPublicKeyComponents<Vec<u8>>);

impl Verifier<Vec<u8>> for Rsa {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> std::result::Result<(), SignatureError> {
        let scheme = &signature::RSA_PKCS1_2048_8192_SHA256;
        self.0.verify(scheme, message, signature).map_err(|_| SignatureError::new())
    }
}
impl JwtVerifier for Rsa {
    fn algorithm(&self) -> Algorithm {
        Algorithm::RS256
    }
}

fn signer(algorithm: &Algorithm, key: &EncodingKey) -> Result<Box<dyn JwtSigner>> {
    match (algorithm, key.family()) {
        (Algorithm::HS256, AlgorithmFamily::Hmac) => {
            Ok(Box::new(Hmac(hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes()))))
        }
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    }
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>> {
    let scheme: &'static dyn signature::VerificationAlgorithm = match (algorithm, key.family()) {
        (Algorithm::HS256, AlgorithmFamily::Hmac) => {
            return Ok(Box::new(Hmac(hmac::Key::new(hmac::HMAC_SHA256, key.try_get_as_bytes()?))));
        }
        (Algorithm::RS256, AlgorithmFamily::Rsa) => match key.kind() {
            DecodingKeyKind::RsaModulusExponent { n, e } => {
                return Ok(Box::new(Rsa(signature::RsaPublicKeyComponents { n: n.clone(), e: e.clone() })));
            }
            DecodingKeyKind::SecretOrDer(_) => &signature::RSA_PKCS1_2048_8192_SHA256,
        },
        (Algorithm::ES256, AlgorithmFamily::Ec) => &signature::ECDSA_P256_SHA256_FIXED,
        (Algorithm::EdDSA, AlgorithmFamily::Ed) => &signature::ED25519,
        _ => return Err(ErrorKind::InvalidAlgorithm.into()),
    };
    let key = signature::UnparsedPublicKey::new(scheme, key.try_get_as_bytes()?.to_vec());
    Ok(Box::new(Public { algorithm: *algorithm, key }))
}
