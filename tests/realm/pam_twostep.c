/*
 * A PAM module for tests: a second factor. It says something, asks for a code with the echo on, both in one call of the
 * conversation; then, in a second call, for a secret. Code 246810; secret: the account's name backwards.
 *
 * No header is included, so that a compiler without development packages will do; the declarations are those of
 * pam_conv(3) and pam_get_item(3). Linked against libpam itself, since whoever loads libpam may do so RTLD_LOCAL.
 */
typedef struct pam_handle pam_handle_t;
struct pam_message { int style; const char *text; };
struct pam_response { char *text; int retcode; };
struct pam_conv {
    int (*conv)(int, const struct pam_message **, struct pam_response **, void *);
    void *data;
};
extern int pam_get_item(const pam_handle_t *, int, const void **);
extern int pam_get_user(pam_handle_t *, const char **, const char *);
extern int strcmp(const char *, const char *);
extern unsigned long strlen(const char *);
extern void free(void *);

enum { SUCCESS = 0, SYSTEM_ERR = 4, AUTH_ERR = 7, CONV_ERR = 19, ITEM_CONV = 5 };
enum { ECHO_OFF = 1, ECHO_ON = 2, TEXT_INFO = 4 };

static int is_backwards(const char *text, const char *name)
{
    unsigned long n = strlen(name);
    if (strlen(text) != n)
        return 0;
    for (unsigned long i = 0; i < n; i++)
        if (text[i] != name[n - 1 - i])
            return 0;
    return 1;
}

int pam_sm_authenticate(pam_handle_t *handle, int flags, int argc, const char **argv)
{
    const struct pam_message hint = {TEXT_INFO, "Look at your token."}, code = {ECHO_ON, "Verification code: "};
    const struct pam_message secret = {ECHO_OFF, "Secret: "};
    const struct pam_message *first[2] = {&hint, &code}, *second[1] = {&secret};
    const struct pam_conv *conv;
    struct pam_response *responses = 0;
    const char *user;
    int right;

    (void)flags, (void)argc, (void)argv;
    if (pam_get_item(handle, ITEM_CONV, (const void **)&conv) || !conv || pam_get_user(handle, &user, 0))
        return SYSTEM_ERR;
    if (conv->conv(2, first, &responses, conv->data) || !responses)
        return CONV_ERR;
    right = responses[1].text && !strcmp(responses[1].text, "246810");
    free(responses[0].text), free(responses[1].text), free(responses);
    responses = 0;
    if (conv->conv(1, second, &responses, conv->data) || !responses)
        return CONV_ERR;
    right = right && responses[0].text && is_backwards(responses[0].text, user);
    free(responses[0].text), free(responses);
    return right ? SUCCESS : AUTH_ERR;
}

int pam_sm_setcred(pam_handle_t *handle, int flags, int argc, const char **argv)
{
    (void)handle, (void)flags, (void)argc, (void)argv;
    return SUCCESS;
}
