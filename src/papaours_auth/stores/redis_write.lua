-- One change: checked, written, logged and announced, or nothing at all.
-- KEYS: changes, then whatever is checked or written, all in one slot.
-- ARGV, in turn: the channel; "1" where a foreign key is added; how many checks, each (key, field, "1" or "0" for is there,
-- value); how many writes, each (how many words, command, key, further words); how many log entries, each (nonce, text);
-- the question's word. A key is its place in KEYS.
-- Gives the word, and 0 when done, the number of the check that failed, or -1 where the log is lost.
local question = ARGV[#ARGV]
local length = redis.call('LLEN', KEYS[1])
if length == 0 then return {question, -1} end
local at = 0
local function word()
  at = at + 1
  return ARGV[at]
end
local channel = word()
-- An entry's time ends with "m" for as long as the partition holds no key but those minted here.
local minted_only = word() ~= '1' and string.match(redis.call('LINDEX', KEYS[1], -1), '^%d+ %x+ %d+(m?)') or ''
for check = 1, tonumber(word()) do
  local key, field, there, value = KEYS[tonumber(word())], word(), word(), word()
  local found = redis.call('HGET', key, field)
  if (there == '1') ~= (found ~= false) or (found and found ~= value) then return {question, check} end
end
for _ = 1, tonumber(word()) do
  local words = {}
  for place = 1, tonumber(word()) do
    words[place] = word()
  end
  words[2] = KEYS[tonumber(words[2])]
  redis.call(unpack(words))
end
local time = redis.call('TIME')
local committed = string.format('%d%06d%s', time[1], time[2], minted_only)
local entries = tonumber(word())
for _ = 1, entries do
  length = length + 1
  redis.call('RPUSH', KEYS[1], string.format('%d %s %s %s', length, word(), committed, word()))
end
if entries > 0 then redis.call('PUBLISH', channel, '') end
return {question, 0}
